"""What a cloud writes down: events in words for a person, or one JSON object a line for a machine.

An event has a name that does not change, a sentence, and fields that are numbers or short words. There is
no way to log what crosses the wire: a field of any other type is written as the name of its type. Bearer
tokens and session ids are never given to a logger; `shown` makes of an id what can be looked for in a log.
"""

import hashlib
import json
import logging
import sys
from datetime import datetime, timezone
from typing import Literal, TypeAlias

Field: TypeAlias = "str | int | float | bool | None"
LogFormat: TypeAlias = Literal["text", "json"]

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
MOST_CHARACTERS = 2000  # of one field: a name, a sentence


def set_up(level: str, log_format: LogFormat) -> None:
    """Send all that is logged to stderr, in this format, from this level (debug, info ...) on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(log_format == "json")  # else they would be lines of another kind


def failed(message: str) -> None:
    """Say that nothing goes on, for this reason: in the log's own format, once that is known."""
    if any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers):
        fields: dict[str, Field] = {}
        extra = {"event": "failed", "fields": fields}
        logging.getLogger(__name__).error("%s", message, extra=extra)
    else:
        print(f"error: {message}", file=sys.stderr)


def event(log: logging.Logger, name: str, message: str, **fields: Field) -> None:
    """Log an event of ordinary life.

    Parameters
    ----------
    log
        The logger of the module that it happens in.
    name
        What machines know the event by.
    message
        The same for a person.
    **fields
        What belongs to it.
    """
    log.info("%s", message, extra={"event": name, "fields": fields})


def warning(log: logging.Logger, name: str, message: str, **fields: Field) -> None:
    """Log an event that an operator should see, as `event` does."""
    log.warning("%s", message, extra={"event": name, "fields": fields})


def shown(session_id: bytes) -> str:
    """Return what stands for a session in the log; the id itself would let others ask for the session."""
    return hashlib.sha256(session_id).hexdigest()[:12]


class JsonLines(logging.Formatter):
    """One JSON object a record: ``time`` (UTC), ``level``, ``logger``, ``event``, ``message``, its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Field] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", "message"),
            "message": record.getMessage()[:MOST_CHARACTERS],
        }
        for name, value in getattr(record, "fields", {}).items():
            line[name] = _plain(value)
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _plain(value: object) -> Field:
    if isinstance(value, str):
        return value[:MOST_CHARACTERS]
    if value is None or isinstance(value, bool | int | float):
        return value
    return type(value).__name__
