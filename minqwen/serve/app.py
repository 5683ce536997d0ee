"""The addresses that are served, and who may ask."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minqwen.checks import did_you_mean
from minqwen.errors import MinqwenError
from minqwen.files import printable, quoted
from minqwen.sampling.params import OF_OTHERS
from minqwen.serve.chat import Chat
from minqwen.serve.completions import Completions
from minqwen.serve.errors import ApiError
from minqwen.serve.front import Ticket
from minqwen.serve.orders import Job
from minqwen.serve.page import PAGE, page_headers
from minqwen.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    first_mistake,
)
from minqwen.serve.service import NO_TEMPLATES, Service

Result = TypeVar("Result")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
GONE = 499  # what logs say of a client that did not wait; nobody reads this answer
HEALTH_SECONDS = 30.0
BEARER = HTTPBearer(auto_error=False, description="The key that the server was started with")
Given = Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]


def make_app(
    service: Service,
    api_key: str | None = None,
    hosts: Sequence[str] = LOOPBACK,
    health_seconds: float = HEALTH_SECONDS,
) -> FastAPI:
    """The application.

    api_key: what clients must send as "Authorization: Bearer KEY"; None: nothing. hosts: the names
    by which clients may call the server, so that no page in a browser can reach it by a name of its
    own; ["*"]: any. health_seconds: how long the engine may take to begin a step.
    """
    app = FastAPI(
        title="minqwen",
        description="OpenAI's API, and some of vLLM's, over minqwen.",
        docs_url=None,  # FastAPI's pages fetch scripts from elsewhere
        redoc_url=None,
    )
    guarded = [Depends(key_check(api_key))]
    add_handlers(app, service)
    add_page(app)
    add_generation(app, service, guarded)
    add_tokens(app, service, guarded)
    add_state(app, service, guarded, health_seconds)
    app.add_middleware(BodyLimit, most=service.limits.body_bytes)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return app


def add_page(app: FastAPI) -> None:
    """The page needs no key: it has nothing of the model, and takes the key from its reader."""
    text = PAGE.read_text(encoding="utf-8")
    headers = page_headers(text)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(text, headers=headers)


def add_generation(app: FastAPI, service: Service, guarded: Sequence[Any]) -> None:
    @app.post("/v1/completions", dependencies=guarded, responses=ANSWERS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete one prompt or several."""
        call, jobs = await run_in_threadpool(service.completions, body)
        return await answered(service, request, call, jobs)

    @app.post("/v1/chat/completions", dependencies=guarded, responses=ANSWERS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        call, jobs = await run_in_threadpool(service.chat, body)
        return await answered(service, request, call, jobs)


def add_tokens(app: FastAPI, service: Service, guarded: Sequence[Any]) -> None:
    @app.post("/tokenize", dependencies=guarded, responses=REFUSALS)
    def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a text or of a chat."""
        return service.tokenize(body)

    @app.post("/detokenize", dependencies=guarded, responses=REFUSALS)
    def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids."""
        return service.detokenize(body)

    @app.get("/tokenizer_info", dependencies=guarded, responses=REFUSALS)
    def tokenizer_info() -> dict[str, Any]:
        """The tokenizer's sizes, special tokens and chat template."""
        return service.tokenizer_info()


def add_state(
    app: FastAPI, service: Service, guarded: Sequence[Any], health_seconds: float
) -> None:
    @app.get("/v1/models", dependencies=guarded, responses=REFUSALS)
    def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [service.model_card()]}

    @app.get("/v1/models/{model:path}", dependencies=guarded, responses=REFUSALS)
    def model(model: str) -> dict[str, Any]:
        """The same, by its name."""
        service.check_model(model)
        return service.model_card()

    @app.get("/health", responses=REFUSALS)
    async def health() -> dict[str, str]:
        """Whether the engine's loop goes on."""
        await advances(service, health_seconds)
        return {"status": "ok"}

    @app.get("/metrics", dependencies=guarded, responses=REFUSALS, response_class=PlainTextResponse)
    def metrics() -> Response:
        """Prometheus's text."""
        return Response(service.metrics.text(), media_type=PROMETHEUS)


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot be served; the message says why"},
    401: {"description": "The API key is missing or wrong"},
    404: {"description": "There is no such model"},
    413: {"description": "The body is too large"},
    422: {"description": "The engine has ended the request; the message says why"},
    429: {"description": "Too many requests run or wait"},
    503: {"description": "The server is ending, or no step was free in time"},
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, whole or as a stream",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    **REFUSALS,
}


# ---- answers ------------------------------------------------------------------------------------


async def answered(
    service: Service, request: Request, call: Completions | Chat, jobs: Sequence[Job]
) -> Response:
    """Run the jobs, and answer whole or in pieces."""
    front = service.front
    ticket = front.enter(jobs)
    if not call.body.stream:
        try:
            outputs = await unless_gone(request, ticket.outputs())
            if outputs is None:
                return Response(status_code=GONE)
            return JSONResponse(await run_in_threadpool(call.answer, outputs))
        finally:
            front.leave(ticket)
    try:
        accepted = await unless_gone(request, accepted_by(ticket))
    except BaseException:
        front.leave(ticket)
        raise
    if accepted is None:
        front.leave(ticket)
        return Response(status_code=GONE)
    return EventStream(events_of(call, ticket), partial(front.leave, ticket))


async def accepted_by(ticket: Ticket) -> bool:
    await ticket.accepted()
    return True


async def events_of(call: Completions | Chat, ticket: Ticket) -> AsyncIterator[str]:
    """The stream: a line of JSON for each chunk. An error in its midst is a chunk too."""
    try:
        async for piece in call.pieces(ticket):
            yield event(json.dumps(piece, allow_nan=False))
    except ApiError as error:
        yield event(json.dumps(error.body()))
    yield event("[DONE]")


def event(data: str) -> str:
    return f"data: {data}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events. on_end is called when all is sent, or the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], on_end: Callable[[], None]):
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.on_end()


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result | None:
    """What the work comes to; None if the client goes away before."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(left(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        gone.cancel()


async def left(request: Request) -> None:
    """Returns when the client has closed its connection. Its body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def advances(service: Service, seconds: float) -> None:
    """Raise ApiError unless the engine begins another turn in time."""
    if service.loop.ended:
        raise ApiError(503, "the engine's loop has ended", code="unhealthy")
    loop, turned = asyncio.get_running_loop(), asyncio.Event()

    def turn() -> None:
        loop.call_soon_threadsafe(turned.set)

    service.loop.ping(turn)
    try:
        await asyncio.wait_for(turned.wait(), seconds)
    except asyncio.TimeoutError:
        why = f"the engine has begun no step within {seconds:g} s"
        raise ApiError(503, why, code="unhealthy") from None


# ---- refusals -----------------------------------------------------------------------------------


def key_check(api_key: str | None) -> Callable[..., None]:
    """A dependency that raises ApiError unless the client has the key."""

    def check(given: Given) -> None:
        if api_key is None:
            return
        found = b"" if given is None else given.credentials.encode("latin-1")  # as it was sent
        if not secrets.compare_digest(found, api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    return check


def add_handlers(app: FastAPI, service: Service) -> None:
    """Every refusal has OpenAI's shape."""

    def told(error: ApiError) -> JSONResponse:
        service.metrics.refused.labels(str(error.status)).inc()
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return told(error)

    @app.exception_handler(MinqwenError)
    async def mistaken(request: Request, error: MinqwenError) -> JSONResponse:
        return told(ApiError(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return told(of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return told(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return told(ApiError(500, "the server has made a mistake: its log says more"))


def of_validation(errors: Sequence[Any]) -> ApiError:
    """What is wrong with a request's fields, in one line."""
    place, message = first_mistake(errors)
    name = place.split(".")[0]
    if errors[0]["type"] == "extra_forbidden":
        field = place.split(".")[-1]
        known = [*CompletionRequest.model_fields, *ChatRequest.model_fields]
        hint = f": {OF_OTHERS[field]}" if field in OF_OTHERS else did_you_mean(field, known)
        hint = f": {NO_TEMPLATES}" if field == "chat_template" else hint
        message = f"there is no field {quoted(place, 100)}{hint}"
    elif name == "prompt":
        expected = "expected text, a list of texts, token ids, or lists of token ids"
        message = f"prompt: {expected}"
    return ApiError(400, message, param=printable(name) or None)


class BodyLimit:
    """Refuses a body of more than `most` bytes, before it is read where its length is known."""

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.most:
            error = ApiError(413, f"the body has more than {self.most} bytes")
            await JSONResponse(error.body(), error.status)(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413, f"the body has more than {self.most} bytes")
            return message

        await self.app(scope, counted, send)
