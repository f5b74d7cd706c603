"""A Dagster logger for the command line: one short line a message, progress bars drawn in place."""

import logging
import sys
from datetime import datetime

import dagster as dg

from clipcov_pipeline.progress import EMPTY_BLOCK, FULL_BLOCK


class TerminalHandler(logging.StreamHandler):
    """Writes messages without Dagster's prefixes; on a terminal a progress line replaces the last one."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self._in_place = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        text = message_of(record)
        is_progress = text.startswith((FULL_BLOCK, EMPTY_BLOCK))
        stamp = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        level = "" if record.levelno < logging.WARNING else f"{record.levelname}: "
        if self.stream.isatty():
            start = "\r\x1b[K" if self._in_place else ""
            self.stream.write(f"{start}{stamp}  {level}{text}" + ("" if is_progress else "\n"))
            self._in_place = is_progress
        else:
            self.stream.write(f"{stamp}  {level}{text}\n")
        self.flush()


def message_of(record: logging.LogRecord) -> str:
    """Return what a record says; of a failed step its cause, which Dagster's own message leaves out."""
    meta = getattr(record, "dagster_meta", None) or {}
    text = str(meta.get("orig_message") or record.getMessage())
    event = meta.get("dagster_event")
    if event is None or not event.is_step_failure:
        return text
    failure = event.step_failure_data
    if failure.user_failure_data is not None:
        return f"{text} {failure.user_failure_data.description}"
    return f"{text}\n{failure.error.to_string()}" if failure.error else text


@dg.logger
def terminal_logger(init_context: dg.InitLoggerContext) -> logging.Logger:
    """Return a logger that shows what the assets say, not the framework's own events."""
    del init_context
    logger = logging.Logger("clipcov.terminal", level=logging.INFO)
    logger.addHandler(TerminalHandler())
    return logger
