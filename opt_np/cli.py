"""The command line: opt-np train | generate | logits | info."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from opt_np.train import Options, train


def main(argv=None):
    parser = argparse.ArgumentParser(prog="opt-np")
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("train")
    for f in dataclasses.fields(Options):
        flag = "--" + f.name.replace("_", "-")
        if f.name == "resume":
            p.add_argument(flag, action="store_true")
        elif f.name in ("text", "eval_text"):
            p.add_argument(flag, nargs="+", default=(), type=str)
        elif f.default is dataclasses.MISSING:
            p.add_argument(flag, required=True)
        else:
            p.add_argument(flag, default=f.default, type=str if f.default is None else type(f.default))
    a = vars(parser.parse_args(argv))
    a.pop("command")
    a["text"], a["eval_text"] = tuple(a["text"]), tuple(a["eval_text"])
    print(train(Options(**a)))


if __name__ == "__main__":
    main(sys.argv[1:])
