"""Errors of the chat API, in OpenAI's form."""

# Seconds after which a client that was turned away may ask again.
RETRY_AFTER = 2


class ApiError(Exception):
    """A request that is not answered, as OpenAI's API tells it.

    Attributes:
      status: of HTTP.
      body: JSON-ready.
      headers: beside the usual ones.
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
    """The error of a server that is at its limit, for now."""
    return ApiError(message, status=status, code=code, retry_after=RETRY_AFTER)


def too_large(most: int) -> ApiError:
    """The error of a body with more bytes than it may have."""
    return ApiError(f"the request has more than {most} bytes", status=413, code="request_too_large")


def no_file(param: str) -> ApiError:
    """The error of an id that is no file's."""
    return ApiError("there is no such file", status=404, code="file_not_found", param=param)
