"""The closed catalogue of errors that a client can get. Nothing else crosses the HTTP boundary.

    NeapError
      RequestError(code)          4xx: the request is wrong, too large, too late, or unauthorised
      UnavailableError(code)      429/503/5xx: the service cannot serve it now, or lost it

`ERRORS[code]` gives the HTTP status, the OpenAI error type and whether a client should retry (x-should-retry). Messages
are written here and by validation, never taken from an exception of another library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


@dataclass(frozen=True, kw_only=True)
class ErrorKind:
    """One row of the catalogue. `retry` is what x-should-retry says."""

    status: int
    type: ErrorType
    retry: bool
    message: str


ERRORS: dict[str, ErrorKind] = {
    # the request
    "invalid_json": ErrorKind(
        status=400, type="invalid_request_error", retry=False, message="The body is not valid JSON."
    ),
    "invalid_value": ErrorKind(status=400, type="invalid_request_error", retry=False, message="A value is not valid."),
    "unsupported_parameter": ErrorKind(
        status=400, type="invalid_request_error", retry=False, message="This parameter is not supported."
    ),
    "context_length_exceeded": ErrorKind(
        status=400, type="invalid_request_error", retry=False, message="The prompt does not fit the model's context."
    ),
    "kv_capacity_exceeded": ErrorKind(
        status=400, type="invalid_request_error", retry=False, message="The prompt does not fit any worker's KV memory."
    ),
    "invalid_api_key": ErrorKind(
        status=401, type="authentication_error", retry=False, message="The API key is missing or wrong."
    ),
    "not_found": ErrorKind(
        status=404, type="invalid_request_error", retry=False, message="There is nothing at this path."
    ),
    "model_not_found": ErrorKind(
        status=404, type="invalid_request_error", retry=False, message="This model is not served."
    ),
    "method_not_allowed": ErrorKind(
        status=405, type="invalid_request_error", retry=False, message="This path does not take that method."
    ),
    "deadline_exceeded": ErrorKind(
        status=408,
        type="invalid_request_error",
        retry=False,
        message="The deadline passed before the request was done.",
    ),
    "body_too_large": ErrorKind(
        status=413, type="invalid_request_error", retry=False, message="The body is too large."
    ),
    "headers_too_large": ErrorKind(
        status=431, type="invalid_request_error", retry=False, message="The headers are too large."
    ),
    # the service
    "overloaded": ErrorKind(
        status=429, type="rate_limit_error", retry=True, message="The queue is full; try again later."
    ),
    "model_not_ready": ErrorKind(status=503, type="server_error", retry=True, message="The model is not ready yet."),
    "no_worker": ErrorKind(status=503, type="server_error", retry=True, message="No worker can serve this now."),
    "shutting_down": ErrorKind(status=503, type="server_error", retry=True, message="The service is shutting down."),
    "decode_worker_lost": ErrorKind(
        status=500, type="server_error", retry=False, message="Two workers were lost while they ran this request."
    ),
    "kv_transfer_failed": ErrorKind(
        status=502, type="server_error", retry=True, message="The prompt's KV could not be transferred."
    ),
    "slow_client": ErrorKind(
        status=408, type="invalid_request_error", retry=False, message="The client did not read its stream."
    ),
    "internal_error": ErrorKind(status=500, type="server_error", retry=False, message="Something went wrong here."),
    # the admin API
    "worker_not_found": ErrorKind(
        status=404, type="invalid_request_error", retry=False, message="There is no such worker."
    ),
    "last_decode_worker": ErrorKind(
        status=409, type="invalid_request_error", retry=False, message="No other decode worker is ready."
    ),
    "switch_under_way": ErrorKind(
        status=409,
        type="invalid_request_error",
        retry=True,
        message="Another worker of this pool is changing its role.",
    ),
    "switch_refused": ErrorKind(
        status=409, type="invalid_request_error", retry=True, message="The worker refused the change."
    ),
    "switch_rolled_back": ErrorKind(
        status=409, type="server_error", retry=True, message="The worker went back to its old role."
    ),
    "switch_unknown": ErrorKind(
        status=502, type="server_error", retry=True, message="The worker did not tell how the change ended."
    ),
}

# codes that a worker sends to a router and a client never sees: the router dispatches the request again
REFUSED = "refused"  # incarnation or epoch is not the worker's
BUSY = "busy"  # no room now


class NeapError(Exception):
    """An error of the catalogue, with the parameter and the words for this case."""

    def __init__(self, code: str, message: str = "", *, param: str | None = None, retry_after_s: float | None = None):
        self.kind = ERRORS[code]
        self.code = code
        self.message = message or self.kind.message
        self.param = param
        self.retry_after_s = retry_after_s
        super().__init__(self.message)


class RequestError(NeapError):
    """The request cannot be served as it is; sending it again will not help."""


class UnavailableError(NeapError):
    """The service cannot serve the request now, or lost it."""
