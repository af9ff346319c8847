"""What a cloud says no with: a status and a message for one caller, which harm nobody else."""

import grpc


class Refusal(Exception):
    """A request that is answered with a status and a message, and harms nobody else."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        retry_after_s: float | None = None,
        reason: str = "request",  # a word that metrics and logs know it by
        successor: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.retry_after_s, self.reason = code, message, retry_after_s, reason
        self.successor = successor  # where to go instead (HOST:PORT)


def invalid(message: str) -> Refusal:
    """Return a refusal of a message that can never be right."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message, reason="message")


def no_memory(what: str) -> Refusal:
    """Return the refusal of something that the cloud has no memory for right now."""
    message = f"the cloud ran out of memory over {what}; send less at once, or try again later"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    return Refusal(code, message, retry_after_s=1.0, reason="memory")
