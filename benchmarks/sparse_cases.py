"""Random cases of the products against float64 dense products: layout, shape, dtype, stride and offset, forward and backward.

    python benchmarks/sparse_cases.py                    # 10,000 cases, about two minutes
    python benchmarks/sparse_cases.py --first 10000      # the next ones

Each case is one `random_case` of tests/sparse/test_products.py, which runs 3,000 of them in CI: the largest error over the largest reference value,
divided by the bound of the dtype (1e-12 float64, 5e-6 float32, 1e-2 bfloat16 and float16). A case above 1 is a wrong number; the exit status is then 1.
The sparse kernels alone are run, never the dense product. Writes benchmarks/results/sparse_cases.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from onetorch.sparse import costs, cpu

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "sparse"))
from test_products import random_case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sparse_cases.json")
    arguments = parser.parse_args()
    if cpu.library() is None:
        sys.exit("no C++ compiler: this benchmark is of the compiled kernels")
    torch.set_num_threads(arguments.threads)
    costs.break_even = lambda *_: costs.NEVER  # type: ignore[assignment]
    start = time.perf_counter()
    wrong, worst = {}, (0.0, -1)
    for seed in range(arguments.first, arguments.first + arguments.cases):
        ratio = random_case(seed)
        if not ratio <= 1:
            wrong[seed] = ratio
            sys.stdout.write(f"WRONG case {seed}: {ratio:.3g} times the bound\n")
        worst = max(worst, (ratio, seed))
    seconds = round(time.perf_counter() - start)
    cases = {"cases": arguments.cases, "first": arguments.first, "wrong": wrong}
    result = {**cases, "worst_share_of_bound": round(worst[0], 3), "worst_case": worst[1], "torch": torch.__version__}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**result, "seconds": seconds}, indent=1) + "\n")
    right = arguments.cases - len(wrong)
    sys.stdout.write(f"{right} of {arguments.cases} right, worst {worst[0]:.2f} of its bound (case {worst[1]}), {seconds} s; {arguments.out}\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
