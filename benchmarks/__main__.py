"""`python -m benchmarks`: measure all rows, print the table and write it. See README.md beside this file."""

import argparse
import fnmatch
import json
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from . import harness, inference, methods, selection, side_by_side, table, tools, training  # noqa: E402, F401  (they register rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("only", nargs="*", help="names or globs of rows; by default all, and the files are written")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--growth", action="store_true", help="measure how cost grows, and draw growth.png")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what the measuring processes are told
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        chosen = harness.ROWS[arguments.measure]
        found = harness.measure_alone(chosen, arguments.alone) if arguments.alone else harness.measure(chosen)
        print(json.dumps(found))
        return 0
    if arguments.list:
        print("\n".join(f"{key:24}{row.work}" for key, row in harness.ROWS.items()))
        return 0
    if arguments.growth:
        from . import growth

        growth.main()
        return 0
    patterns = arguments.only or ["*"]
    rows = [r for key, r in harness.ROWS.items() if any(fnmatch.fnmatchcase(key, p) for p in patterns)]
    if not rows:
        print(f"no row fits {' '.join(patterns)}; --list names them", file=sys.stderr)
        return 2
    facts, lines, started = table.machine(), [], time.perf_counter()
    gpu = harness.gpu_name()
    facts["gpu"] = gpu
    for row in rows:
        if row.gpu and gpu is None:
            continue
        for line in harness.run_row(row):
            lines.append(line)
            print(table.show(line), flush=True)
    facts["minutes"] = round((time.perf_counter() - started) / 60, 1)
    print(f"{len(lines)} lines in {facts['minutes']} minutes")
    if not arguments.only:
        table.write(lines, facts)
        print(f"written to {table.HERE / 'table.md'} and table.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
