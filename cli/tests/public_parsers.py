#!/usr/bin/env python3
"""Opens every form of one transcript with parsers that others wrote, and compares what they read.

    pip install srt==3.5.3 webvtt-py==0.6.0 pyannote.database==6.1.1
    python3 cli/tests/public_parsers.py cli/tests/data/formats

The folder holds one transcript as result.json and, beside it, any of transcript.txt, .srt, .vtt, .rttm and .words.json, as
`voxfleet export` and `voxfleet transcribe` write them:

    voxfleet export call-7 -f json -o x/result.json
    for form in txt:text srt:srt vtt:vtt rttm:rttm words.json:words; do
        voxfleet export call-7 -f ${form#*:} -o x/transcript.${form%%:*}
    done

Exits 1 where a form cannot be read or says something else, 77 where a package is missing."""

import html
import json
import pathlib
import re
import sys

try:
    import srt
    import webvtt
    from pyannote.database.util import load_rttm
except ImportError as missing:
    print(f"skipped: {missing}", file=sys.stderr)
    sys.exit(77)


def letters(text):
    """What is said, without white space: a form may break lines, and words longer than a line, where it likes."""
    return "".join(text.split())


def in_order(cues):
    assert cues, "no cues"
    for start, end, lines in cues:
        assert start < end, (start, end)
        assert 1 <= len(lines) <= 2 and all(lines), lines
        assert all(len(line) <= 42 for line in lines), lines
    for (_, end, _), (start, _, _) in zip(cues, cues[1:]):
        assert end <= start, f"a cue ends at {end}, the next begins at {start}"


def without_names(text, names):
    return re.sub(rf"^({'|'.join(map(re.escape, names))}): ", "", text) if names else text


def read_txt(path, whole, names):
    lines = path.read_text().splitlines()
    said = "".join(without_names(line, names) for line in lines)
    assert letters(said) == letters(whole["full_text"]), said
    return f"{len(lines)} lines"


def read_srt(path, whole, names):
    cues = list(srt.parse(path.read_text()))
    in_order([(c.start.total_seconds(), c.end.total_seconds(), c.content.split("\n")) for c in cues])
    assert [cue.index for cue in cues] == list(range(1, len(cues) + 1))
    said = "".join(without_names(cue.content, names) for cue in cues)
    # The form has no escapes: an arrow would be a time range.
    assert letters(said) == letters(whole["full_text"].replace("-->", "->")), said
    assert srt.compose(cues) == path.read_text(), "written again it is another file"
    return f"{len(cues)} cues"


def seconds(stamp):
    return (stamp.hours * 60 + stamp.minutes) * 60 + stamp.seconds + stamp.milliseconds / 1000


def read_vtt(path, whole, names):
    cues = list(webvtt.read(path))
    # The parser leaves escapes and tags as they stand.
    texts = [html.unescape(re.sub(r"<v [^>]*>", "", cue.raw_text)) for cue in cues]
    in_order([(seconds(c.start_time), seconds(c.end_time), text.split("\n")) for c, text in zip(cues, texts)])
    assert letters("".join(texts)) == letters(whole["full_text"]), texts
    voices = {cue.voice for cue in cues if cue.voice}
    assert voices == set(names), f"voices {voices}, speakers {names}"
    return f"{len(cues)} cues, voices {sorted(voices)}"


def read_rttm(path, whole, names):
    files = load_rttm(path)
    if not whole["speaker_turns"] and not names:
        assert not files, files
        return "nobody"
    (turns,) = files.values()
    assert set(turns.labels()) >= set(names), (turns.labels(), names)
    read = sorted((segment.start, segment.end, who) for segment, _, who in turns.itertracks(yield_label=True))
    given = sorted((turn["start"], turn["end"], turn["speaker"]) for turn in whole["speaker_turns"])
    for (start, end, who), (other_start, other_end, other) in zip(read, given):
        assert who == other and abs(start - other_start) < 1e-3 and abs(end - other_end) < 1e-3, (start, end, who)
    assert not given or len(read) == len(given)
    return f"{len(read)} turns of {turns.labels()}"


def read_words(path, whole, names):
    words = json.loads(path.read_text())["words"]
    given = [word for segment in whole["aligned_segments"] for word in segment["words"]]
    assert len(words) == len(given)
    for word, other in zip(words, given):
        assert set(word) == {"word", "start", "end", "score", "speaker", "channel"}, word
        assert word["word"] == other["word"].strip() and abs(word["start"] - other["start"]) < 1e-3, (word, other)
        assert word["start"] <= word["end"] and 0 <= word["score"] <= 1, word
    return f"{len(words)} words"


FORMS = {"txt": read_txt, "srt": read_srt, "vtt": read_vtt, "rttm": read_rttm, "words.json": read_words}


def main():
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder = pathlib.Path(sys.argv[1])
    whole = json.loads((folder / "result.json").read_text())
    segments = whole["aligned_segments"]
    names = {segment["speaker"] for segment in segments if not segment["words"]}
    names |= {word["speaker"] or segment["speaker"] for segment in segments for word in segment["words"]}
    names = sorted(names - {None})
    failed, read = 0, 0
    for ending, reader in FORMS.items():
        path = folder / f"transcript.{ending}"
        if not path.is_file():
            continue
        read += 1
        try:
            print(f"{path.name}: {reader(path, whole, names)}")
        except Exception as error:  # each of the parsers has errors of its own
            failed += 1
            print(f"{path.name}: {type(error).__name__}: {error}", file=sys.stderr)
    if not read:
        print(f"{folder}: no transcript.txt, .srt, .vtt, .rttm or .words.json", file=sys.stderr)
    return 0 if read and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
