"""python -m moe_lib run | plan | data: the study without a notebook."""
import argparse
import os
import sys
from moe_lib import study, store
from moe_lib.data import DataError
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    for n in ("profile","study","dataset","arm"): parser.add_argument("--"+n)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seeds", type=int)
    a = parser.parse_args()
    runs = study.runs(a.profile, a.study, a.dataset, a.arm)
    study.ensure(runs, a.workers)
if __name__ == "__main__":
    main()
