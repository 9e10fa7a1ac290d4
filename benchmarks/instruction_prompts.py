"""Writes trainer/recipes/instructions.jsonl: short requests, each about a topic of its own, with one or two
instructions that rule `instructions` checks.

    python -m benchmarks.instruction_prompts

Since no two prompts share a topic, held-out prompts have held-out topics. The kinds are those that
SmolLM2-135M-Instruct follows sometimes. It hardly ever writes in lower case, in capitals, in quotation marks or ends
with a given phrase, and then no sample is good enough to learn from. Upper limits alone would
reward ever shorter answers.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FILE = Path(__file__).parents[1] / "trainer/recipes/instructions.jsonl"
REQUESTS = ("Tell me about {}.", "Describe {}.", "What is special about {}?", "What should everybody know about {}?",
            "Explain {} to a child.", "Why do people like {}?")
WORDS = ("morning", "window", "river", "friend", "winter", "music", "garden", "summer", "paper", "color")
ONE = ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"})
LENGTHS = (
    ("Answer in one sentence.", [ONE]),
    ("Use between 8 and 20 words.", [("count:word_count_range", {"min_words": 8, "max_words": 20})]),
    ("Answer in one sentence of at least 10 words.", [
        ONE, ("length_constraints:number_words", {"num_words": 10, "relation": "at least"})]),
)
STYLES = (
    ("", []),
    ("Do not use commas.", [("punctuation:no_comma", {})]),
    ('Use the word "{}".', [("keywords:existence", {"keywords": ["{}"]})]),
    ('Do not use the word "the".', [("keywords:forbidden_words", {"forbidden_words": ["the"]})]),
    ('Do not use the word "and".', [("keywords:forbidden_words", {"forbidden_words": ["and"]})]),
    ("Highlight one part with *asterisks*.", [("detectable_format:number_highlighted_sections",
                                               {"num_highlights": 1})]),
)
TOPICS = """
    owls, foxes, whales, penguins, bees, spiders, horses, dolphins, wolves, elephants, butterflies, turtles,
    crows, bats, cats, dogs, ants, octopuses, rabbits, squirrels, frogs, snakes, eagles, parrots, goats, cows,
    pigs, ducks, swans, geese, hedgehogs, badgers, moles, deer, bears, tigers, lions, giraffes, zebras, camels,
    llamas, kangaroos, koalas, pandas, monkeys, gorillas, sloths, otters, beavers, seals, walruses, sharks,
    salmon, jellyfish, starfish, crabs, lobsters, snails, worms, beetles, ladybugs, dragonflies, moths,
    crickets, mosquitoes, fireflies, pigeons, sparrows, robins, woodpeckers, peacocks, ostriches, flamingos,
    storks, hummingbirds, lizards, crocodiles, chameleons, goldfish, hamsters, donkeys, sheep, chickens,
    reindeer, raccoons, skunks, porcupines, cheetahs, hippos, rhinos, bread, cheese, soup, pizza, pasta, rice,
    noodles, pancakes, waffles, chocolate, honey, coffee, tea, lemonade, apples, bananas, oranges, strawberries,
    cherries, grapes, peaches, pears, plums, mangoes, pineapples, coconuts, watermelons, lemons, potatoes,
    carrots, tomatoes, onions, garlic, mushrooms, spinach, broccoli, pumpkins, beans, peas, corn, peanuts,
    almonds, walnuts, butter, yogurt, ice cream, omelets, sandwiches, salads, sushi, tacos, curry, dumplings,
    sausages, popcorn, cookies, muffins, pies, doughnuts, jam, pickles, olives, vinegar, salt, pepper, cinnamon,
    ginger, mint, basil, vanilla, maple syrup, mustard, ketchup, oatmeal, smoothies, apple juice, milk, cocoa,
    croissants, bagels, bicycles, umbrellas, clocks, candles, mirrors, pencils, notebooks, backpacks, kites,
    bridges, ladders, hammers, scissors, needles, buttons, zippers, shoes, gloves, scarves, hats, glasses,
    telescopes, microscopes, cameras, radios, telephones, computers, keyboards, printers, batteries, light
    bulbs, lamps, ovens, refrigerators, toasters, kettles, spoons, forks, plates, cups, teapots, pillows,
    blankets, mattresses, sofas, tables, chairs, bookshelves, carpets, curtains, windows, doors, keys, locks,
    ropes, nets, baskets, boxes, bottles, jars, balloons, dolls, puzzles, board games, playing cards, dice,
    chess pieces, guitars, pianos, violins, drums, flutes, trumpets, boats, sailboats, canoes, trains, trams,
    buses, trucks, tractors, helicopters, airplanes, rockets, satellites, wheels, magnets, compasses, maps,
    globes, coins, stamps, envelopes, newspapers, magazines, dictionaries, diaries, calendars, thermometers,
    vacuum cleaners, washing machines, lawn mowers, wheelbarrows, fences, swimming, running, hiking, cycling,
    dancing, singing, painting, drawing, knitting, sewing, cooking, baking, gardening, fishing, camping,
    sailing, rowing, surfing, skiing, skating, climbing, yoga, chess, tennis, football, basketball, baseball,
    volleyball, badminton, golf, archery, juggling, bird watching, stargazing, photography, pottery,
    woodworking, calligraphy, origami, reading, writing letters, keeping a diary, learning a language, playing
    the piano, playing the guitar, listening to music, watching films, visiting museums, collecting stamps,
    collecting shells, flying a kite, riding a horse, walking a dog, feeding birds, planting trees, growing
    tomatoes, making bread, making soup, brewing tea, cleaning a kitchen, washing dishes, ironing a shirt,
    packing a suitcase, moving house, saving money, studying at night, getting up early, taking a nap, taking
    notes, giving a speech, telling jokes, telling stories, making friends, working in a team, working from
    home, driving a car, taking the bus, traveling by train, riding a ferry, sleeping in a tent, building a
    snowman, building sandcastles, solving puzzles, doing homework, waiting in line, shopping for shoes, cutting
    hair, changing a tire, fixing a bicycle, deserts, forests, mountains, rivers, lakes, oceans, islands, caves,
    volcanoes, waterfalls, beaches, swamps, meadows, canyons, glaciers, jungles, farms, villages, cities,
    castles, lighthouses, libraries, museums, theaters, cinemas, schools, universities, hospitals, airports,
    train stations, harbors, markets, bakeries, restaurants, hotels, parks, zoos, gardens, playgrounds,
    stadiums, factories, offices, banks, post offices, bookshops, barns, windmills, greenhouses, tunnels,
    canals, dams, towers, pyramids, temples, cathedrals, cottages, attics, basements, kitchens, balconies, rain,
    snow, fog, wind, thunder, lightning, rainbows, clouds, sunsets, sunrises, the moon, the stars, comets,
    planets, the sun, gravity, shadows, echoes, tides, waves, earthquakes, floods, droughts, storms, hail,
    frost, icicles, dew, puddles, mud, sand, clay, pebbles, diamonds, gold, silver, iron, coal, amber, salt
    lakes, spring, summer, autumn, winter, mornings, evenings, trees, oak trees, palm trees, bamboo, cactuses,
    roses, tulips, daisies, sunflowers, moss, ferns, ivy, grass, seeds, leaves, pine cones, acorns, coral reefs,
    teachers, doctors, nurses, farmers, bakers, pilots, sailors, firefighters, police officers, librarians,
    carpenters, plumbers, electricians, painters, poets, actors, dentists, lawyers, judges, engineers,
    astronauts, scientists, gardeners, tailors, barbers, waiters, cooks, shepherds, bus drivers, mechanics,
    photographers, journalists, translators, architects, musicians, clowns, magicians, detectives, explorers,
    beekeepers, miners, potters, weavers, blacksmiths, grandparents, neighbors, twins, best friends, babies,
    teenagers, patience, courage, kindness, honesty, curiosity, friendship, laughter, dreams, memory, silence,
    luck, habits, promises, secrets, mistakes, birthdays, holidays, weekends, breakfast, picnics, parades,
    weddings, fairy tales, riddles, poems, songs, films, cartoons, comics, mathematics, history, geography,
    biology, chemistry, astronomy, music, handwriting, spelling, alphabets, colors
"""


def rows() -> list[dict]:
    """The rows of the file: every topic once, every pair of a length and a style about as often."""
    draw = random.Random(0)
    topics = [" ".join(topic.split()) for topic in TOPICS.split(",")]
    draw.shuffle(topics)
    found = []
    for i, topic in enumerate(topics):
        (length, first), (style, second) = LENGTHS[i % len(LENGTHS)], STYLES[i // len(LENGTHS) % len(STYLES)]
        request, word = draw.choice(REQUESTS).format(topic), draw.choice(WORDS)
        given = json.loads(json.dumps([*first, *second]).replace("{}", word)) if "{}" in style else [*first, *second]
        text = " ".join(filter(None, (request[0].upper() + request[1:], length, style.format(word))))
        found.append({"prompt": text, "instruction_id_list": [name for name, _ in given],
                      "kwargs": [arguments for _, arguments in given]})
    return found


if __name__ == "__main__":
    FILE.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
