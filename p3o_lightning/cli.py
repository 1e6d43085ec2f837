"""The `p3o` command: `fit`, `validate`, `test` and `predict` are LightningCLI; the other commands are one file each in commands/.

Nothing heavy is imported before it is needed, so that `p3o --help` is instant.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import NoReturn

from p3o_lightning.errors import InputError
from p3o_lightning.text import visible

HELP = """\
usage: p3o COMMAND [options]

Reinforcement learning from human feedback by relative feedback (P3O), on PyTorch Lightning.

train and use models (LightningCLI; each takes --config FILE, several overlay, and --help):
  fit         train a stage: SupervisedPolicy, RewardModel or PairwisePolicy; or DirectPreferencePolicy (DPO)
  validate    evaluate on the validation rows
  test        evaluate on the test rows
  predict     sample responses to prompts, as JSON lines

others:
  demo        the whole pipeline on a tiny generated task, about two minutes on a CPU, no download
  report      how far a reward model, or an ensemble of them, can be trusted, on pairs that people ranked
  winrate     how often one policy's responses beat another's: judged by a reward, a function or a language model
  doctor      report the environment, and what would stop a run; --plan FILE: the memory that it will take
  frontier    KL-reward frontiers of several objectives, coefficients and seeds, from a plan

  p3o fit --config configs/debug/policy.yaml       a first run, seconds on a CPU
  p3o fit --config FILE --print_config             the resolved config
  p3o fit --config FILE --ckpt_path last           resume where the run stopped

options: --help, --version
"""
COMMANDS = ("demo", "doctor", "frontier", "report", "winrate")
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(arguments: list[str] | None = None) -> None:
    """Run one command. Exits 0 on success, 2 on bad input with one line, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if os.getcwd() not in sys.path:  # so that a config can name the user's own files: class_path, reward_funcs
        sys.path.insert(0, os.getcwd())
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if arguments[0] in ("-V", "--version"):
        from p3o_lightning import __version__

        print(__version__)
        return
    command = arguments[0]
    if command not in (*COMMANDS, *TRAINER_COMMANDS):
        fail(f"{command!r} is no command: choose one of {', '.join((*TRAINER_COMMANDS, *COMMANDS))} (p3o --help).")

    try:
        if command in COMMANDS:
            import_module(f"p3o_lightning.commands.{command}").main(arguments[1:])
        else:
            import_module("p3o_lightning.commands.trainer").main(arguments)
    except InputError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("p3o: interrupted", file=sys.stderr)
        sys.exit(130)


class OneLineParser(argparse.ArgumentParser):
    """argparse, whose errors take one line like all of ours."""

    def error(self, message: str) -> NoReturn:
        """Exit 2 by way of `main`."""
        raise InputError(f"{self.prog.removeprefix('p3o ')}: {message} ({self.prog} --help).")


def fail(message: str) -> NoReturn:
    """One line on standard error, exit status 2."""
    print(f"p3o: error: {visible(' '.join(message.split()))}", file=sys.stderr)  # it may quote a stranger's data
    sys.exit(2)


if __name__ == "__main__":
    main()
