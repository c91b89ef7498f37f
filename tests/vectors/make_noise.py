"""Writes golden draws of the discrete Gaussian, so that another implementation can be compared word for word.

Run it only when the way a keystream becomes noise changes: `python -m tests.vectors.make_noise`. The keys serve these
vectors only. `first` is the start of the draws, `sha256` covers all of them as 64-bit little-endian integers; counts
above 65 536 go over the end of a stream.
"""

import hashlib
import json
from fractions import Fraction
from pathlib import Path

from privacy.noise import Source, discrete_gaussian, distance, representable

PATH = Path(__file__).parent / "noise" / "golden.json"
SIGMAS = ("0.01", "0.3", "1", "3.7", "31.99", "32", "100/3", "1000", "45000.5", "1048576", "11863283.2", "268435456")
COUNTS = (1, 40, 70_000)
SHOWN = 40


def key(name: str) -> bytes:
    return hashlib.sha256(f"consilium test vectors/noise/{name}".encode()).digest()


def golden() -> dict:
    rows = []
    for text in SIGMAS:
        sigma = Fraction(text)
        for count in COUNTS:
            draws = discrete_gaussian(count, sigma, Source.for_tests_only(key(text)))
            rows.append({
                "sigma": text, "representable": str(representable(sigma)), "key": key(text).hex(), "count": count,
                "distance": str(distance(count, sigma)), "first": draws[:SHOWN].tolist(),
                "sha256": hashlib.sha256(draws.astype("<i8").tobytes()).hexdigest(),
            })  # fmt: skip
    streams = Source.for_tests_only(key("keystream")).streams(2)
    return {
        "keystream": {"key": key("keystream").hex(), "streams": [stream.words(4).tolist() for stream in streams]},
        "draws": rows,
    }


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(golden(), indent=1) + "\n", encoding="utf-8")
