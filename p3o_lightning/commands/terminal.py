"""What libraries say while a run goes on: news, and no advertising. What the run itself shows is in progress.py."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO

from transformers.utils.logging import disable_progress_bar

# Advertising, and what a user can do nothing about.
_NOISE = (
    "litlogger",
    "litmodels",
    "GPU available",
    "TPU available",
    "HPU available",
    "`Trainer.fit` stopped",
    "was configured so",  # limit_val_batches, as asked
    "Seed set to",
    "Detected KeyboardInterrupt",
    "Received SIGTERM",
    "Restoring states from the checkpoint path",
    "Restored all states from the checkpoint",
    "Loaded model weights from the checkpoint",
)
_IGNORED = (
    ".*LeafSpec.*",
    ".*does not have many workers.*",
    ".*no `val_dataloader`.*",
    ".*log_every_n_steps.*",
    ".*eval mode.*",
    ".*args parameter is intended.*",
    ".*Total length of `list` across ranks is zero.*",  # no validation, as asked
    ".*is_gradient_checkpointing.*",
    ".*You have overridden .* in `LightningModule` but have passed in a `LightningDataModule`.*",
)


class CurrentStderr(logging.StreamHandler):  # without a type: it takes one from Python 3.11 on only
    """Writes to what `sys.stderr` is now: the progress bar puts a proxy there, so that a message does not land in its middle."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """Asked at every message."""
        return sys.stderr


def quiet_libraries(quiet: bool = False, trains: bool = True) -> None:
    """Drop what helps no one; with `quiet`, all but warnings. Calling it again changes nothing."""
    disable_progress_bar()  # transformers', of loading and saving weights: a line each
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers = [handler for handler in logger.handlers if type(handler) is not logging.StreamHandler]
        if not any(isinstance(handler, CurrentStderr) for handler in logger.handlers):
            logger.addHandler(CurrentStderr())
        for handler in logger.handlers:
            handler.addFilter(_is_news)
        logger.propagate = False  # else a library that has set up logging shows every line twice
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("transformers.modeling_utils").addFilter(_is_load_news)
    for message in (*_IGNORED, *(() if trains else (".*callbacks used to create the checkpoint need to be provided.*",))):
        warnings.filterwarnings("ignore", message)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(word in record.getMessage() for word in _NOISE)


def _is_load_news(record: logging.LogRecord) -> bool:
    """A reward model that starts from a language model lacks its head and has one too many: that is how it is meant."""
    text = record.getMessage()
    if "LOAD REPORT" not in text:
        return True
    keys = {line.split("|")[0].strip() for line in text.splitlines() if line.count("|") >= 2}
    return not {key for key in keys if "." in key} <= {"score.weight", "lm_head.weight"}
