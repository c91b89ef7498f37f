"""Writes the golden study: a draft in TOML, its canonical body and its hash, for another implementation to agree with.

Run it only when the schema number changes: `python -m tests.vectors.make_study`.
"""

import json
from pathlib import Path

from privacy.canonical import canonical
from privacy.study import Study
from privacy.study_text import template

HERE = Path(__file__).parent / "study"


def main() -> None:
    draft = template("alpha", ["st-anna", "st-berta"])
    study = Study.from_toml(draft)
    golden = {"toml": draft, "canonical": canonical(study.body()).decode(), "hash": study.hash}
    (HERE / "golden.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
