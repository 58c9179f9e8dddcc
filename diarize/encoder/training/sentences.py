"""English sentences from a small grammar with a wide vocabulary: what the synthetic voices say.

No two voices get the same texts on purpose: an embedding must not depend on the words.
"""
import random

PEOPLE = """Abigail Ahmed Alice Amir Beatrice Boris Bruno Camille Carlos Charlotte Dagmar Dmitri Edith Eleanor Emeka Fatima Felix Florence
Gabriel Giovanna Grace Hannah Harold Hiroshi Ibrahim Ingrid Isabel Ivan Jasmine Joseph Judith Kofi Kwame Laura Leonard Linh Magnus Margaret
Mehmet Miriam Nadia Nathan Nigel Olga Oliver Ophelia Patricia Priya Quentin Rachel Rashid Roberto Rosalind Samuel Sanjay Sofia Stefan
Theodore Tobias Ursula Valentina Vikram Wanda William Xavier Yasmin Yuki Zachary""".split()
PLACES = """Aberdeen Alexandria Antwerp Athens Bangkok Barcelona Beirut Bogota Brisbane Budapest Cairo Calgary Chicago Copenhagen Dakar Delhi
Edinburgh Florence Geneva Hamburg Havana Helsinki Istanbul Jakarta Kampala Lagos Lisbon Liverpool Manila Marseille Melbourne Montreal Munich
Nairobi Naples Osaka Ottawa Philadelphia Prague Quito Rotterdam Salzburg Santiago Seville Shanghai Stockholm Tashkent Toronto Utrecht Valencia
Vancouver Warsaw Wellington Zagreb Zurich""".split()
THINGS = """apple umbrella bridge garden violin lantern river window journal kettle feather mountain blanket hammer whistle orchard thunderstorm
pumpkin engine museum notebook bicycle zebra pigeon village cathedral harbour library spoon ladder volcano sandwich telescope curtain
forest treasure puzzle button carriage envelope fountain guitar helicopter island jungle kitchen lemon microscope napkin ocean parachute
quarry rabbit satellite teapot university vineyard waterfall yacht chimney shoulder breath measure leisure vision youth edge""".split()
KINDS = """ancient bright careful dangerous early famous gentle heavy invisible jolly kind lonely marvellous narrow orange peculiar quiet rough
silver tiny unusual velvet wooden young zealous purple cheap thick smooth joyful thorough awkward brave clever dusty enormous faint""".split()
ACTS = """built carried discovered examined finished gathered hid imagined joined knocked over lifted measured noticed opened painted questioned
repaired sketched touched understood visited watched yanked borrowed chased described enjoyed followed guarded judged threw pushed washed
shook brought avoided chose searched measured explained forgot photographed""".replace("knocked over", "knocked").split()
WAYS = ["slowly", "quickly", "without a sound", "before breakfast", "after the storm", "in the afternoon", "with great care", "every Thursday",
        "in spite of the rain", "just for fun", "under the old oak tree", "while nobody was looking", "at half past nine", "for the second time",
        "during the long winter", "by the edge of the sea", "on the way home", "as usual", "all night long", "through the narrow gate"]
SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
FIXED = [
    "The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs.", "How vexingly quick daft zebras jump!",
    "Sphinx of black quartz, judge my vow.", "The five boxing wizards jump quickly.", "Bright vixens jump; dozy fowl quack.",
    "Could you say that again, please?", "I am not sure whether that is what I meant.", "Well, let us see what happens next.",
    "Yes, I think so, but we ought to ask somebody else.", "No, that was last year, wasn't it?", "Thank you very much for your patience.",
    "We were away a year ago.", "She had your dark suit in greasy wash water all year.", "Don't ask me to carry an oily rag like that.",
]


def number(rng):
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(SMALL)
    if kind == 1:
        return f"{rng.choice(TENS)} {rng.choice(SMALL[1:10])}"
    if kind == 2:
        return f"{rng.choice(SMALL[1:10])} hundred and {rng.choice(TENS)} {rng.choice(SMALL[1:10])}"
    return " ".join(rng.choice(SMALL[:10]) for _ in range(rng.randint(4, 7)))


def sentence(rng):
    p, q, a, b = rng.choice(PEOPLE), rng.choice(PLACES), rng.choice(THINGS), rng.choice(THINGS)
    k, l, v, w = rng.choice(KINDS), rng.choice(KINDS), rng.choice(ACTS), rng.choice(WAYS)
    n = number(rng)
    return rng.choice([
        f"{p} {v} the {k} {a} {w}.", f"The {k} {a} in {q} was {l}, and nobody {v} it.", f"Why has {p} never {v} a {k} {a}?",
        f"In {q} there were {n} {a}s and a {l} {b}.", f"{w}, {p} {v} my {a}, then the {l} {b}.", f"Please call {p} at {n}.",
        f"If the {a} is {k}, the {b} must be {l}.", f"Between {q} and {rng.choice(PLACES)} {p} {v} a {a}.", f"My number is {n}, {n}.",
        f"Have you seen the {k} {a} that {p} {v} {w}?", f"It takes {n} minutes from the {a} to the {k} {b}.", rng.choice(FIXED),
        f"{p}, {rng.choice(PEOPLE)} and {rng.choice(PEOPLE)} {v} the {a} {w}.", f"A {k}, {l} {a} is better than {n} {b}s.",
        f"What a {k} {a}! Who {v} the {b}?", f"I would rather have a {a} than a {k} {b}.",
    ])


def text(rng, words):
    """Sentences until there are at least so many words."""
    out = []
    while sum(len(s.split()) for s in out) < words:
        out.append(sentence(rng))
    return " ".join(out)


if __name__ == "__main__":
    r = random.Random(1)
    for _ in range(10):
        print(text(r, 12))
