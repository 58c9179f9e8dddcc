#!/usr/bin/env python3
"""Compares voxfleet-eval with the tools of the field: jiwer (words, characters), pyannote.metrics (speakers); the word
diarization error rate, which neither has, with its definition written down again by trying every mapping.

    pip install jiwer==4.0.0 pyannote.metrics==4.2.0
    cargo build -p voxfleet-eval --example score
    python3 eval/tests/cross_check.py target/debug/examples/score

Options: --cases N (random cases of each kind, 400), --seed N, --rttm FILE (more real turns; can be repeated),
--print (cases with what the tools say of them, one object a line, instead of comparing), --write-fixtures
(eval/tests/data/agreement.json, which `cargo test` reads without any of this). Exits 1 where anything differs by more than 1e-6, 77 where a package is missing."""

import argparse
import itertools
import json
import pathlib
import random
import subprocess
import sys
import warnings

try:
    import jiwer
    import rapidfuzz
    from pyannote.core import Annotation, Segment, Timeline
    from pyannote.metrics.diarization import DiarizationErrorRate, JaccardErrorRate
except ImportError as missing:
    print(f"skipped: {missing}", file=sys.stderr)
    sys.exit(77)

warnings.filterwarnings("ignore")
HERE = pathlib.Path(__file__).resolve().parent
CALLS = HERE.parent.parent / "tests" / "audio"
NEAR = 1e-6


# ---------------------------------------------------------------- what the others say


def words(question):
    said, heard = [list(side) for side in zip(*question["pairs"])]
    of_words, of_letters = jiwer.process_words(said, heard), jiwer.process_characters(said, heard)
    return {
        "wer": of_words.wer, "mer": of_words.mer, "wil": of_words.wil, "wip": of_words.wip,
        "hits": of_words.hits, "substitutions": of_words.substitutions, "deletions": of_words.deletions,
        "insertions": of_words.insertions, "cer": of_letters.cer, "cer_hits": of_letters.hits,
    }


def annotation(turns):
    made = Annotation(uri="x")
    for track, (start, end, speaker) in enumerate(turns):
        made[Segment(start, end), track] = speaker
    return made


def speakers(question):
    reference, heard = annotation(question["reference"]), annotation(question["heard"])
    options = {"collar": question["collar_s"], "skip_overlap": question["skip_overlap"]}
    regions = question["regions"]
    uem = None if regions is None else Timeline([Segment(*region) for region in regions], uri="x")
    der = DiarizationErrorRate(**options)(reference, heard, uem=uem, detailed=True)
    jer = JaccardErrorRate(**options)(reference, heard, uem=uem)
    return {
        "der": der["diarization error rate"], "total": der["total"], "correct": der["correct"],
        "confusion": der["confusion"], "missed": der["missed detection"], "false_alarm": der["false alarm"], "jer": jer,
    }


def speaker_words(question):
    """Shafey et al. 2019, by trying every one-to-one mapping."""
    reference, heard = question["reference"], question["heard"]
    pairs = []
    numbers = {}
    number = lambda side: [numbers.setdefault(word, len(numbers)) for word, _ in side]
    for op, i1, i2, j1, j2 in rapidfuzz.distance.Levenshtein.opcodes(number(reference), number(heard)):
        if op in ("equal", "replace"):
            pairs += [(reference[i][1], heard[j][1]) for i, j in zip(range(i1, i2), range(j1, j2))]
    names = sorted({r for r, _ in pairs})
    others = sorted({h for _, h in pairs if h is not None})
    names += [None] * max(0, len(others) - len(names))
    best = 0
    for chosen in itertools.permutations(names, len(others)):
        mapping = dict(zip(others, chosen))
        best = max(best, sum(h is not None and mapping[h] == r for r, h in pairs))
    wrong = len(pairs) - best
    return {"wder": wrong / len(pairs) if pairs else 0.0, "pairs": len(pairs), "wrong": wrong}


THEY_SAY = {"words": words, "speakers": speakers, "speaker_words": speaker_words}


# ---------------------------------------------------------------- cases


def mutated(random_, sequence, alphabet, rate):
    """Some of it changed, left out, put in."""
    out = []
    for item in sequence:
        dice = random_.random()
        if dice < rate:
            out.append(random_.choice(alphabet))
        elif dice < 1.8 * rate:
            continue
        else:
            out.append(item)
        if random_.random() < 0.7 * rate:
            out.append(random_.choice(alphabet))
    return out


def random_words(random_):
    # Few different words make many alignments of the same cost, which is where tools differ.
    alphabet = [f"w{n}" for n in range(random_.choice([2, 3, 5, 20, 200]))]
    rate = random_.choice([0.0, 0.05, 0.2, 0.5, 0.9])
    pairs = []
    for _ in range(random_.randint(1, 5)):
        said = [random_.choice(alphabet) for _ in range(random_.choice([0, 1, 3, 10, 40, 90]))]
        independent = random_.random() < 0.2
        heard = [random_.choice(alphabet) for _ in range(random_.randint(0, 40))] if independent \
            else mutated(random_, said, alphabet, rate)
        pairs.append([" ".join(said), " ".join(heard)])
    return {"what": "words", "normalise": "none", "pairs": pairs}


def random_turns(random_, voices, turns):
    made, at = [], random_.uniform(0, 3)
    for _ in range(turns):
        length = random_.uniform(0.05, 6)
        made.append([at, at + length, random_.choice(voices)])
        at += random_.choice([length, length * 0.7, length + random_.uniform(0, 2)])
    return made


def mutated_turns(random_, turns, strength):
    names = sorted({who for _, _, who in turns})
    new = {who: f"S{n}" for n, who in enumerate(random_.sample(names, len(names)))}
    made = []
    for start, end, who in turns:
        if random_.random() < 0.1 * strength:
            continue
        start, end = start + random_.gauss(0, 0.2 * strength), end + random_.gauss(0, 0.2 * strength)
        if end - start > 0.02:
            name = random_.choice(list(new.values())) if random_.random() < 0.15 * strength else new[who]
            made.append([max(0.0, start), max(0.02, end), name])
    return made


def options(random_, turns):
    last = max([end for _, end, _ in turns], default=1.0)
    regions = None
    if random_.random() < 0.3:
        regions = [sorted(random_.uniform(0, last) for _ in range(2)) for _ in range(random_.randint(1, 3))]
    return {
        "what": "speakers", "collar_s": random_.choice([0.0, 0.0, 0.25, 0.5, 1.0]),
        "skip_overlap": random_.random() < 0.4, "regions": regions,
    }


def random_speakers(random_):
    voices = [f"v{n}" for n in range(random_.randint(1, 6))]
    reference = random_turns(random_, voices, random_.choice([0, 1, 5, 20, 60]))
    if random_.random() < 0.3 or not reference:
        others = [f"S{n}" for n in range(random_.randint(1, 6))]
        heard = random_turns(random_, others, random_.randint(0, 30))
    else:
        heard = mutated_turns(random_, reference, random_.choice([0.1, 1, 3]))
    return {**options(random_, reference + heard), "reference": reference, "heard": heard}


def random_speaker_words(random_):
    alphabet = [f"w{n}" for n in range(random_.choice([3, 20, 100]))]
    voices = [f"v{n}" for n in range(random_.randint(1, 4))]
    reference, who = [], random_.choice(voices)
    for _ in range(random_.choice([0, 2, 20, 80])):
        who = random_.choice(voices) if random_.random() < 0.15 else who
        reference.append([random_.choice(alphabet), who])
    others = [f"S{n}" for n in range(random_.randint(1, 5))]
    new = {voice: random_.choice(others) for voice in voices}
    heard = []
    for word, who in reference:
        dice = random_.random()
        if dice < 0.1:
            continue
        name = random_.choice([*others, None]) if random_.random() < 0.2 else new[who]
        heard.append([word if dice > 0.25 else random_.choice(alphabet), name])
    return {"what": "speaker_words", "reference": reference, "heard": heard}


RANDOM = {"words": random_words, "speakers": random_speakers, "speaker_words": random_speaker_words}


def rttm(path):
    files = {}
    for line in pathlib.Path(path).read_text().splitlines():
        fields = line.split()
        if fields and fields[0] == "SPEAKER":
            start, length = float(fields[3]), float(fields[4])
            files.setdefault(fields[1], []).append([start, start + length, fields[7]])
    return files


def real(random_, more):
    """The test calls, and turns of real meetings where they are given; what was heard is made by hand from them."""
    for path in sorted(CALLS.glob("call-*.json")):
        turns = json.loads(path.read_text())["turns"]
        said = [turn["text"] for turn in turns]
        alphabet = sorted({word for line in said for word in line.split()})
        for rate in (0.0, 0.05, 0.3):
            heard = [" ".join(mutated(random_, line.split(), alphabet, rate)) for line in said]
            yield {"what": "words", "normalise": "none", "pairs": [list(pair) for pair in zip(said, heard)]}
            yield {"what": "words", "normalise": "none", "pairs": [[" ".join(said), " ".join(heard)]]}
        spoken = sorted((word["start"], word["word"], turn["speaker"]) for turn in turns for word in turn["words"])
        reference = [[word, who] for _, word, who in spoken]
        heard = [[word, {"agent": "S1"}.get(who, "S2")] for word, who in reference if random_.random() > 0.05]
        swapped = [[word, who if random_.random() > 0.1 else "S1"] for word, who in heard]
        yield {"what": "speaker_words", "reference": reference, "heard": swapped}
    for path in [*sorted(CALLS.glob("call-*.rttm")), *more]:
        for turns in rttm(path).values():
            for strength in (0.2, 1.0):
                heard = mutated_turns(random_, turns, strength)
                for collar, skip in itertools.product((0.0, 0.25, 0.5), (False, True)):
                    yield {"what": "speakers", "collar_s": collar, "skip_overlap": skip, "regions": None,
                           "reference": turns, "heard": heard}


# ---------------------------------------------------------------- comparing


def case(question):
    return json.dumps({"question": question, "expected": THEY_SAY[question["what"]](question)})


def answers(program, questions):
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    done = subprocess.run([program], input=lines, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("score", nargs="?", help="the built example `score`")
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rttm", action="append", default=[])
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--write-fixtures", action="store_true")
    args = parser.parse_args()
    random_ = random.Random(args.seed)

    if args.write_fixtures:
        questions = [RANDOM[kind](random_) for kind in RANDOM for _ in range(25)]
        questions += [question for n, question in enumerate(real(random_, [])) if n % 4 == 0]
        cases = [case(question) for question in questions]
        path = HERE / "data" / "agreement.json"
        path.write_text("[\n" + ",\n".join(cases) + "\n]\n")
        print(f"{len(cases)} cases, {path.stat().st_size} bytes: {path}")
        return 0
    if not (args.score or args.print):
        parser.error("the built example `score` is needed")

    sets = {f"random {kind}": [make(random_) for _ in range(args.cases)] for kind, make in RANDOM.items()}
    for question in real(random_, args.rttm):
        sets.setdefault(f"real {question['what']}", []).append(question)
    if args.print:
        for question in itertools.chain(*sets.values()):
            print(case(question))
        return 0
    failed = 0
    for name, questions in sets.items():
        worst, bad = 0.0, 0
        for question, ours in zip(questions, answers(args.score, questions)):
            theirs = THEY_SAY[question["what"]](question)
            gap = max(abs(ours[figure] - value) for figure, value in theirs.items())
            worst = max(worst, gap)
            if gap > NEAR:
                bad += 1
                if bad == 1:
                    print(json.dumps({"question": question, "ours": ours, "theirs": theirs}), file=sys.stderr)
        print(f"{name}: {len(questions)} cases, {bad} differ, largest difference {worst:.1e}")
        failed += bad
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
