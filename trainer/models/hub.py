"""Models and datasets by their names on the Hugging Face hub: cached, else downloaded by a child process.

A run itself never uses the network. The child runs this module and writes JSON lines: {"about", "bytes"} before a
download, {"done"} during it, then {"path", "commit", "warning"} or {"error"}.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote

from strop.trainer.config import Data, Model
from strop.trainer.environment import user_is_offline
from strop.trainer.errors import UserError
from strop.trainer.run.files import cache_dir, read_json, reason_of, remedy_of, write_atomic

REPO = r"(?P<repo>\w[\w.-]*/\w[\w.-]*)"
MODEL = re.compile(rf"{REPO}(?:@(?P<revision>\S+))?")
DATASET = re.compile(rf"hf:{REPO}(?:/(?P<config>[^/:@]+))?(?:@(?P<revision>[^\s:]+))?(?::(?P<split>\S+))?")
LOADED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]
UNUSED = ["*/*", "consolidated*", "adapter_*"]
LOOKUP_SECONDS = 20  # for the hub to resolve a revision


@dataclass(frozen=True)
class Name:
    """A model (with `code`, including its Python files) or a split of a dataset."""

    repo: str
    revision: str
    code: bool = False
    config: str | None = None
    split: str | None = None

    def file(self, commit: str) -> Path:
        """The Parquet file of the split at a commit."""
        return self.ref("").parent / commit / f"{quote(self.config or 'default', '')}--{quote(self.split, '')}.parquet"

    def ref(self, revision: str) -> Path:
        """The file with the commit that `revision` last resolved to."""
        return cache_dir() / "hub" / self.repo.replace("/", "--") / f"ref-{quote(revision, '')}"

    def patterns(self) -> dict:
        """The files of a model to download, as arguments of huggingface_hub; no pickles."""
        return {"allow_patterns": [*LOADED, "README.md", "LICENSE*", "LICENCE*", "NOTICE*"],
                "ignore_patterns": UNUSED if self.code else [*UNUSED, "*.py"]}

    def cached(self) -> tuple[Path, str] | None:
        """(model folder or Parquet file, commit) from the caches alone."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        if self.split:
            ref = self.ref(self.revision)
            commit = ref.read_text() if ref.exists() else self.revision
            return (self.file(commit), commit) if self.file(commit).exists() else None
        try:
            folder = Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True,
                                            **self.patterns()))
        except (LocalEntryNotFoundError, HFValidationError):
            return None
        shards = [*folder.glob("*.safetensors")]
        for index in folder.glob("*.safetensors.index.json"):
            shards += [folder / shard for shard in read_json(index)["weight_map"].values()]
        return (folder, folder.name) if shards and all(shard.exists() for shard in shards) else None


def is_loaded(file: str) -> bool:
    """Whether a file is part of the hash of a model folder; other tools, and runs, may add files to it."""
    unused = any(fnmatch(file, p) for p in UNUSED) and not file.startswith("additional_chat_templates/")
    return any(fnmatch(file, p) for p in LOADED) and not unused


def is_model_name(path: str) -> bool:
    """Whether model.path is owner/name on the hub, not a path that begins with a local folder."""
    return bool(MODEL.fullmatch(path)) and not path.endswith(".gguf") and not Path(path.split("/")[0]).is_dir()


def find_model(model: Model, console, download: bool, pin: str | None) -> tuple[Path, str | None]:
    """(folder, commit) of model.path, at commit `pin` if given; with download=False the commit is None if the model is
    not cached. Raises UserError if it is neither cached nor can be downloaded."""
    name = Name(code=model.trust_remote_code, **MODEL.fullmatch(model.path).groupdict("main"))
    return _find(f"model.path={model.path}", name, console, download, pin)


def find_data(data: Data, console, download: bool, pins: dict[str, str]) -> dict[str, tuple[Path, str | None]]:
    """{path in the recipe: (Parquet file, commit)} of the paths that begin with hf:, as find_model. Also raises
    UserError on a malformed name, and if the package datasets is missing."""
    found = {}
    keys = [(f"data.{kind}.{i}.path={entry.path}", entry.path or "") for kind in ("sources", "sft", "preferences")
            for i, entry in enumerate(getattr(data, kind))]
    for key, path in keys:
        if path.startswith("hf:") and path not in found:
            match = DATASET.fullmatch(path)
            if not match:
                raise UserError(f"{key}: not a dataset name; write hf:owner/name/config@revision:split, where "
                                "config, revision and split are optional")
            name = Name(match["repo"], match["revision"] or "main", False, match["config"], match["split"] or "train")
            found[path] = _find(key, name, console, download, pins.get(path))
    return found


def _find(key: str, name: Name, console, download: bool, pin: str | None) -> tuple[Path, str | None]:
    name, offline = replace(name, revision=pin or name.revision), user_is_offline()
    fixed = re.fullmatch("[0-9a-f]{40}", name.revision)
    if (fixed or offline or not download) and (found := name.cached()):
        return found
    if not download:
        console.line(f"{key}: not downloaded yet")
        return cache_dir() / "hub" / "missing", None
    if offline:
        raise UserError(f"{key}: revision {name.revision} is not cached, and HF_HUB_OFFLINE forbids downloads; "
                        "unset it, or run this once with a network")
    if name.split and importlib.util.find_spec("datasets") is None:
        raise UserError(f"{key}: downloading it needs the package datasets: pip install datasets")
    answer = _ask_child(name, console)
    if "error" in answer:
        raise UserError(f"{key}: {answer['error']}")
    if answer["warning"]:
        console.warn(f"{key}: {answer['warning']}; commit {answer['commit']} from the cache is used")
    return Path(answer["path"]), answer["commit"]


def _ask_child(name: Name, console) -> dict:
    environment = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    command = [sys.executable, "-P", "-m", "strop.trainer.models.hub", json.dumps(asdict(name))]
    answer, bar = {"error": "the download was interrupted; the same command resumes it"}, None
    with ExitStack() as stack, subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | environment) as child:
        for said in map(json.loads, child.stdout):
            if "about" in said:
                size = f", {said['bytes'] / 1e6:,.1f} MB" if said["bytes"] else ""
                console.line(f"downloading {name.repo}: {said['about']}{size}")
                total = max(1, round(said["bytes"] / 1e6))
                bar = stack.enter_context(console.progress(f"{name.repo} (MB)", total, "MB"))
            elif "done" in said:
                bar.advance(max(0, min(round(said["done"] / 1e6), bar.total) - bar.done))
            else:
                answer = said
        if bar and "path" in answer:
            bar.advance(bar.total - bar.done)
    return answer


# -- the child ---------------------------------------------------------------------------------------------------------


def say(**line) -> None:
    os.write(ANSWERS, (json.dumps(line) + "\n").encode())


def look_up(ask, name: Name, **options):
    """The hub's answer about a repository. The process ends if there is none in time."""
    timer = threading.Timer(LOOKUP_SECONDS, lambda: (say(**unreachable(name, "no answer")), os._exit(1)))
    timer.daemon = True
    timer.start()
    try:
        return ask(name.repo, revision=name.revision, timeout=LOOKUP_SECONDS / 2, **options)
    finally:
        timer.cancel()


def download_model(name: Name) -> tuple[str, str]:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    info = look_up(HfApi().model_info, name, files_metadata=True)
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or ()}
    sizes = {file: sizes[file] for file in filter_repo_objects(sizes, **name.patterns())}
    if "config.json" not in sizes or not any(file.endswith(".safetensors") for file in sizes):
        raise UserError("the repository holds no config.json with *.safetensors (pickled weights are never loaded); "
                        "name one that does, or download its .gguf file and name that")
    if not replace(name, revision=info.sha).cached():
        say(about=f"{len(sizes)} files of commit {info.sha[:12]}", bytes=sum(sizes.values()))
        blobs = Path(constants.HF_HUB_CACHE, f"models--{name.repo.replace('/', '--')}", "blobs")
        threading.Thread(target=watch, args=(blobs,), daemon=True).start()
    folder = snapshot_download(name.repo, revision=name.revision, **name.patterns())
    return folder, Path(folder).name


def watch(blobs: Path) -> None:
    before = None
    while True:
        size = sum(p.stat().st_blocks * 512 for p in blobs.glob("*") if p.exists())
        before = size if before is None else before
        say(done=size - before)
        threading.Event().wait(1)


def download_split(name: Name) -> tuple[str, str]:
    """Writes the split as one Parquet file that names its origin in its metadata."""
    from huggingface_hub import HfApi

    commit = look_up(HfApi().dataset_info, name).sha
    file, ref = name.file(commit), name.ref(name.revision)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        import datasets
        import pyarrow.parquet as pq

        try:
            builder = datasets.load_dataset_builder(name.repo, name.config, revision=commit)
        except ValueError as e:
            configs = datasets.get_dataset_config_names(name.repo, revision=commit)
            if name.config in configs or (name.config is None and len(configs) < 2):
                raise
            wrong = f"there is no config {name.config}" if name.config else "the config is missing"
            raise UserError(f"{wrong}; there are: {', '.join(configs)}; name one as hf:{name.repo}/CONFIG:SPLIT") from e
        splits = list(map(str, builder.info.splits or builder.config.data_files or ()))
        if splits and re.fullmatch(r"[\w.-]+", name.split) and name.split not in splits:
            raise UserError(f"there is no split {name.split}; there are: {', '.join(splits)}")
        say(about=f"split {name.split} of commit {commit[:12]}", bytes=builder.info.download_size or 0)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=name.split).with_format("arrow")
        schema = rows.features.arrow_schema.with_metadata({
            "strop.origin": f"hf:{name.repo}{f'/{name.config}' if name.config else ''}:{name.split}"})

        def write(temporary: Path) -> None:
            with pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
                for table in rows.iter(10_000):
                    writer.write_table(table.cast(schema))

        write_atomic(file, write)
    write_atomic(ref, lambda p: p.write_text(commit))
    return str(file), commit


def unreachable(name: Name, why: str) -> dict:
    from huggingface_hub import constants

    why = f"{constants.ENDPOINT} cannot be reached ({why})"
    if found := name.cached():
        return {"path": str(found[0]), "commit": found[1], "warning": why}
    return {"error": f"{why}; check the network and HF_ENDPOINT, or name a local path"}


def failed(error: Exception, name: Name) -> dict:
    """The error line, without anything that could hold a token; the cached copy if only the network failed."""
    from huggingface_hub import constants

    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) and "EntryNotFound" not in str(type(below)):
        chain.append(below)  # skip earlier lookups of optional files
    names = {c.__name__ for e in chain for c in type(e).__mro__}
    status = next((r.status_code for e in chain if (r := getattr(e, "response", None)) is not None), None)
    disk = next((e for e in chain if remedy_of(e).startswith(("free", "make"))), None)
    if isinstance(error, UserError):
        said = str(error)
    elif disk is not None:
        said = f"{getattr(disk, 'filename', None) or constants.HF_HOME}: cannot be written ({reason_of(disk)}); free " \
               "some space there, or set HF_HOME and XDG_CACHE_HOME to another disk"
    elif "RevisionNotFoundError" in names:
        said = f"the repository has no revision {name.revision}; name an existing branch, tag or commit"
    elif "GatedRepoError" in names or status == 403 or "is a gated dataset" in str(error):
        said = "access to the repository is gated; accept the terms on its page, and set HF_TOKEN in the environment " \
               "to a token of that account"
    elif "RepositoryNotFoundError" in names or status in (401, 404):
        said = f"there is no repository {name.repo}, or it is private; correct the name, or set HF_TOKEN in the " \
               "environment"
    elif status or {"TransportError", "ConnectionError", "TimeoutError"} & names:
        return unreachable(name, f"HTTP {status}" if status else reason_of(chain[-1]))
    else:
        said = f"it cannot be read ({type(error).__name__}: {reason_of(error)}); name another, or a local path"
    return {"error": said}


def main(name: Name) -> None:
    try:
        path, commit = (download_split if name.split else download_model)(name)
        say(path=path, commit=commit, warning="")
    except Exception as e:
        say(**failed(e, name))


if __name__ == "__main__":
    ANSWERS = os.dup(1)
    os.dup2(2, 1)  # libraries print to stdout, too
    main(Name(**json.loads(sys.argv[1])))
