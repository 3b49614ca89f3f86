"""Errors of the chat API in OpenAI's format."""

# Seconds after which a refused client may retry.
RETRY_AFTER = 2


class ApiError(Exception):
    """A request error in the format of OpenAI's API.

    Attributes:
      status: HTTP status.
      body: JSON-ready response body.
      headers: additional response headers.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        self.status, self.code = status, code
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}


def busy(message: str, *, status: int = 503, code: str = "no_free_stream") -> ApiError:
    """The error for a server that is temporarily at its limit."""
    return ApiError(message, status=status, code=code, retry_after=RETRY_AFTER)


def too_large(most: int) -> ApiError:
    """The error for a body that exceeds the limit in bytes."""
    return ApiError(f"the request has more than {most} bytes", status=413, code="request_too_large")


def no_file(param: str) -> ApiError:
    """The error for an unknown file id."""
    return ApiError("there is no such file", status=404, code="file_not_found", param=param)
