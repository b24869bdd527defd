"""Writes every report of docs/evidence anew from its rows: tables, comparisons and plots.

    python examples/evidence.py                        # all
    python examples/evidence.py study-zero-shot        # some folders
    python examples/evidence.py --from study           # takes the rows of a study (examples/study.py) over first

A folder of results there is one of `ltp-sparse run`; its rows name their recipe.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ltp_sparse.recipes import load_recipe, results
from ltp_sparse.report.pages import write_report

FOLDER = Path(__file__).parents[1] / "docs" / "evidence"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="names of folders (default: all)")
    parser.add_argument("--evidence", type=Path, default=FOLDER, help="folder of the folders (default: docs/evidence)")
    parser.add_argument("--from", dest="study", type=Path, help="output of a study, whose rows are copied first")
    options = parser.parse_args()
    if options.study is not None:
        take_over(options.study, options.evidence)
    for folder in sorted(options.evidence.iterdir()):
        if (folder / results.RESULTS).is_file() and (not options.folders or folder.name in options.folders):
            rows = results.read(folder / results.RESULTS)
            write_report(load_recipe(rows[0]["recipe"]), rows, folder)
            (folder / "report.html").unlink()  # the site has its own pages, and LaTeX nobody reads there
            (folder / "table.tex").unlink()
            print(f"{folder.name}: {len(rows)} rows")


def take_over(study: Path, evidence: Path) -> None:
    """Copies the rows of every recipe; those that stand there already must be among them."""
    for source in sorted(study.glob(f"*/{results.RESULTS}")):
        target = evidence / source.parent.name / results.RESULTS
        known = {row["id"] for row in results.read(target)}
        if lost := known - {row["id"] for row in results.read(source)}:
            raise ValueError(f"{source}: {len(lost)} rows of {target} are not in it; it is another study")
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


if __name__ == "__main__":
    main()
