"""Google Speech Commands, unpacked, as OUT/train/CLASS and OUT/test/CLASS: links for 12 classes.

    python benchmarks/speech_commands.py speech_commands gsc12

Warden, "Speech commands", 2018 (arXiv 1804.03209): ten words, `_unknown_` drawn from all other
words, as many as a word has on average, and as many seconds of `_silence_` from the recordings of
background noise. testing_list.txt says which clips test, so that no voice is in both; the first
80 % of each noise recording train.
"""

from __future__ import annotations

import argparse
import random
import sys
import wave
from pathlib import Path

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
NOISE, UNKNOWN, SILENCE = "_background_noise_", "_unknown_", "_silence_"
TRAINING_SHARE = 0.8  # of each noise recording


def arrange(source: Path, out: Path, *, seed: int = 0) -> dict[str, dict[str, int]]:
    """How many clips each split and class has. ValueError with one sentence if `source` is no such
    data set."""
    listed = source / "testing_list.txt"
    if not listed.is_file() or not (source / NOISE).is_dir():
        raise ValueError(
            f"{source} has no testing_list.txt or no {NOISE}/: name the folder where Speech "
            "Commands was unpacked"
        )
    tested = set(listed.read_text().split())
    draw = random.Random(seed)
    counts: dict[str, dict[str, int]] = {}
    for split in ("train", "test"):
        clips: dict[str, list[Path]] = {}
        for folder in sorted(source.iterdir()):
            if not folder.is_dir() or folder.name == NOISE:
                continue
            clips[folder.name] = []
            for file in sorted(folder.glob("*.wav")):
                if (f"{folder.name}/{file.name}" in tested) == (split == "test"):
                    clips[folder.name].append(file)
        chosen = {word: clips.pop(word, []) for word in WORDS}
        if not all(chosen.values()):
            raise ValueError(
                f"{source} has no {split} clips of '{next(w for w in WORDS if not chosen[w])}': "
                "unpack it anew"
            )
        each = round(sum(map(len, chosen.values())) / len(WORDS))
        others = [clip for found in clips.values() for clip in found]
        chosen[UNKNOWN] = draw.sample(others, min(each, len(others)))
        for name, found in chosen.items():
            (out / split / name).mkdir(parents=True, exist_ok=True)
            for clip in found:
                link = out / split / name / f"{clip.parent.name}_{clip.name}"
                link.unlink(missing_ok=True)
                link.symlink_to(clip.resolve())
        _write_silence(source / NOISE, out / split / SILENCE, each, draw, training=split == "train")
        counts[split] = {name: len(found) for name, found in chosen.items()} | {SILENCE: each}
    return counts


def _write_silence(
    noise: Path, out: Path, count: int, draw: random.Random, *, training: bool
) -> None:
    """`count` seconds, drawn from the front or the back part of the recordings."""
    out.mkdir(parents=True, exist_ok=True)
    recordings = [str(file) for file in sorted(noise.glob("*.wav"))]
    if not recordings:
        raise ValueError(f"{noise} has no .wav files: unpack the data set anew")
    for index in range(count):
        with wave.open(draw.choice(recordings)) as file:
            rate, frames = file.getframerate(), file.getnframes()
            edge = int(TRAINING_SHARE * frames)
            first, last = (0, edge - rate) if training else (edge, frames - rate)
            file.setpos(draw.randint(first, max(first, last)))
            second = file.readframes(rate)
            with wave.open(str(out / f"{index:05}.wav"), "wb") as cut:
                cut.setnchannels(file.getnchannels())
                cut.setsampwidth(file.getsampwidth())
                cut.setframerate(rate)
                cut.writeframes(second)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        for split, classes in arrange(arguments.source, arguments.out).items():
            print(f"{split}: {', '.join(f'{count} {name}' for name, count in classes.items())}")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
