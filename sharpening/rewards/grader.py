"""A vision chat model as a judge of images, behind any endpoint that speaks the OpenAI protocol.

Calls are asynchronous with bounded concurrency. The OpenAI SDK repeats what may succeed later (408, 409, 429, 5xx,
broken connections, timeouts) with backoff, honouring Retry-After. A reply is asked for in a JSON schema; an endpoint
that refuses is asked for plain JSON, and then for nothing but text, and JSON is looked for in what it writes. What
cannot be read as grades on the template's scale is asked for again, and in the end is a failure: a score is never made
up.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import openai
from openai.types.chat import ChatCompletion
from PIL import Image

from mllm_template import Template
from sharpening.errors import UserError, first_line, require
from sharpening.rewards.grade_cache import GradeCache
from sharpening.rewards.grades import BadReplyError, Grades, read_grades, reply_schema, system_message

logger = logging.getLogger(__name__)
T = TypeVar("T")

FATAL = {
    401: "check OPENAI_API_KEY or --api_key",
    402: "the account has no credit left",
    403: "the key may not use this model; check --mllm_model and the key's permissions",
    404: "check --mllm_model and --base_url",
}


@dataclass(frozen=True)
class Failure:
    """Why one image has no grades."""

    reason: str


class GraderError(RuntimeError):
    """No further image can be graded: the key, the model or the spending cap is at fault."""


class RefusalError(ValueError):
    """The model or its endpoint will not grade this image, however often it is asked."""


class CallsSpent(BaseException):
    """The cap is reached. Not an Exception, because the SDK would take one for a broken connection and try again."""


@dataclass
class Tries:
    """How many requests one image may still cost."""

    left: int


class BoundedClient(openai.DefaultAsyncHttpxClient):
    """An HTTP client that bounds a whole request. Its own timeout is for each read, which a server that sends a byte
    now and then never reaches."""

    def __init__(self, seconds: float, **options: Any) -> None:
        super().__init__(timeout=seconds, **options)
        self.seconds = seconds

    async def send(self, request: Any, **options: Any) -> Any:
        async with asyncio.timeout(self.seconds):
            response = await super().send(request, **options)
            await response.aread()
            return response


@dataclass(frozen=True)
class Endpoint:
    """Who is asked.

    Attributes:
        model: name of the model at the endpoint.
        base_url: of the endpoint; None is OPENAI_BASE_URL or else OpenAI's own.
        api_key: None is OPENAI_API_KEY; an endpoint other than OpenAI's may need none.
    """

    model: str
    base_url: str | None
    api_key: str | None = field(repr=False)


@dataclass(frozen=True)
class Limits:
    """What asking may cost.

    Attributes:
        concurrency: calls under way at once.
        timeout: seconds for one call, from the request to the last byte of its answer.
        max_retries: how often one image is tried again, be it after a call that failed or a reply that is not grades.
        max_calls: requests to send at most, retries included; None is no cap.
    """

    concurrency: int
    timeout: float
    max_retries: int
    max_calls: int | None


class Grader:
    """A judge of images; thread-safe, one event loop on a thread of its own for its whole life.

    Args:
        template: what it is told and which scores it gives.
        endpoint: who is asked.
        limits: what that may cost.
        folder: where grades are kept; see `GradeCache`.

    Raises:
        UserError: naming the flag, if there is no key, the endpoint refuses it or cannot be reached.
    """

    def __init__(self, template: Template, endpoint: Endpoint, limits: Limits, folder: Path) -> None:
        self.template, self.model, self.limits = template, endpoint.model, limits
        self.calls = 0
        api_key = _key(endpoint)
        self._secret = api_key or "no key"
        self._client = openai.AsyncOpenAI(
            api_key=api_key or "none",  # the SDK insists on one, servers of one's own ignore it
            base_url=endpoint.base_url,
            timeout=limits.timeout,
            http_client=BoundedClient(limits.timeout, event_hooks={"request": [self._count]}),
        )
        self.base_url = str(self._client.base_url)
        self._cache = GradeCache(folder, template, self.base_url, self.model)
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._tries: ContextVar[Tries] = ContextVar("tries")  # of the image that the running task grades
        self._fatal: GraderError | None = None
        # Both shrink to what the endpoint was seen to take. A reply of one number is text from the start.
        self._formats: list[dict[str, Any] | None] = [None]
        if template.aspects:
            schema = {"name": "grades", "strict": True, "schema": reply_schema(template)}
            self._formats[:0] = [{"type": "json_schema", "json_schema": schema}, {"type": "json_object"}]
        self._options: dict[str, Any] = {"temperature": 0}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="mllm grader").start()
        self._start(self._greet())()

    def begin(self, images: np.ndarray, prompts: list[str]) -> Callable[[], list[Grades | Failure]]:
        """Begin to grade images `(B, H, W, 3)` uint8 with their prompts; equal pairs are asked for once.

        What is returned waits for the grades or the failure of each, and raises a GraderError if nothing more can be
        graded. Grades that came in before are in the cache.
        """
        keys = [self._cache.key(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        first_row = {key: keys.index(key) for key in keys}
        outcomes = self._start(self._grade_all([(key, images[row], prompts[row]) for key, row in first_row.items()]))

        def wait() -> list[Grades | Failure]:
            graded = outcomes()
            return [graded[key] for key in keys]

        return wait

    async def _grade_all(self, tasks: list[tuple[str, np.ndarray, str]]) -> dict[str, Grades | Failure]:
        outcomes = await asyncio.gather(*(self._grade_one(*task) for task in tasks), return_exceptions=True)
        for outcome in outcomes:  # only now, so that whatever was paid for has reached the cache
            if isinstance(outcome, CallsSpent):
                raise GraderError(
                    f"--mllm_max_calls={self.limits.max_calls} requests are spent; raise it to go on"
                ) from outcome
            if isinstance(outcome, BaseException):
                raise outcome
        return {key: outcome for (key, _, _), outcome in zip(tasks, outcomes, strict=True)}

    async def _grade_one(self, key: str, image: np.ndarray, prompt: str) -> Grades | Failure:
        cached = self._cache.recall(key)
        if cached is not None:
            return cached
        tries = Tries(self.limits.max_retries + 1)
        self._tries.set(tries)
        async with self._slots:
            messages = self._messages(image, prompt)
            while tries.left > 0:
                if self._fatal:  # found by another image while this one waited
                    raise self._fatal
                try:
                    reply = await self._ask(messages, tries)
                    grades = read_grades(reply, self.template)
                except BadReplyError as error:
                    reason = f"{error}, the last of {self.limits.max_retries + 1} tries"
                except RefusalError as error:
                    return Failure(str(error).replace(self._secret, "***")[:200])
                except openai.APIStatusError as error:
                    reason = f"the endpoint answered {error.status_code} ({self._redacted(error)})"
                    if error.status_code in FATAL or "insufficient_quota" in str(error):
                        remedy = FATAL.get(error.status_code, FATAL[402])
                        self._fatal = GraderError(f"{reason}; {remedy}")
                        raise self._fatal from None
                    return Failure(reason)
                except openai.APIConnectionError as error:
                    return Failure(f"the connection broke ({self._redacted(error.__cause__ or error)})")
                else:
                    self._cache.keep(key, prompt, reply.replace(self._secret, "***"), grades)
                    return grades
        return Failure(reason)

    async def _ask(self, messages: list[dict[str, Any]], tries: Tries) -> str:
        """The text of one reply; the format asked for is relaxed as far as the endpoint demands."""
        formats, options = list(self._formats), dict(self._options)
        while True:
            asked = options | ({"response_format": formats[0]} if formats[0] else {})
            client = self._client.with_options(max_retries=tries.left - 1)
            try:
                completion = await client.chat.completions.create(model=self.model, messages=messages, **asked)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                tries.left += 1  # to ask for less is no retry
                if "temperature" in str(error) and options.pop("temperature", None) is not None:
                    continue
                if len(formats) == 1 or not any(word in str(error).lower() for word in ("format", "json", "schema")):
                    raise
                formats.pop(0)
            except openai.APIError:
                raise
            except TimeoutError:
                raise BadReplyError("the endpoint did not answer in time, see --mllm_timeout") from None
            except Exception as error:  # a body that is no JSON, or no completion
                raise BadReplyError(f"the endpoint sent no chat completion ({self._redacted(error)})") from None
            else:
                if (len(formats), len(options)) < (len(self._formats), len(self._options)):
                    logger.info("the grader's endpoint takes no JSON schema or no temperature; asking without")
                self._formats = min(self._formats, formats, key=len)
                self._options = min(self._options, options, key=len)
                return _text(completion)

    def _messages(self, image: np.ndarray, prompt: str) -> list[dict[str, Any]]:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=95, subsampling=0)
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        question = json.dumps({"prompt": prompt}, ensure_ascii=False)
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
        return [
            {"role": "system", "content": system_message(self.template)},
            {"role": "user", "content": content},
        ]

    async def _greet(self) -> None:
        """List the endpoint's models, which costs nothing, to learn now rather than after an hour's loading."""
        try:
            await self._client.with_options(max_retries=1).models.list()
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise UserError(
                    f"--reward_model mllm: {self.base_url} answered {error.status_code} ({self._redacted(error)}); "
                    f"{FATAL[401]}"
                ) from None
        except openai.APIConnectionError as error:
            raise UserError(
                f"--reward_model mllm: {self.base_url} cannot be reached "
                f"({self._redacted(error.__cause__ or error)}); check --base_url and the connection"
            ) from None
        except Exception as error:
            logger.debug(f"listing models failed: {self._redacted(error)}")  # many servers have no such list

    async def _count(self, request: Any) -> None:
        if request.method != "POST":
            return
        if self.limits.max_calls is not None and self.calls >= self.limits.max_calls:
            raise CallsSpent
        self.calls += 1
        self._tries.get().left -= 1

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> Callable[[], T]:
        """Run a coroutine on the loop; what is returned waits for its result."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)

        def wait() -> T:
            try:
                return future.result()
            except KeyboardInterrupt:
                future.cancel()
                raise

        return wait

    def _redacted(self, error: BaseException) -> str:
        """An error on one line, without the key, which some endpoints repeat in theirs."""
        return first_line(error, self._secret)


def _key(endpoint: Endpoint) -> str:
    """The key to send, empty where none is needed."""
    key = (endpoint.api_key or os.environ.get("OPENAI_API_KEY") or "").strip()  # a key from a file ends in a newline
    require(
        key.isascii() and key.isprintable(),
        "--reward_model mllm: the key holds characters that no key has; check --api_key or OPENAI_API_KEY",
    )
    require(
        bool(key or endpoint.base_url or os.environ.get("OPENAI_BASE_URL")),
        "--reward_model mllm needs a key: set the environment variable OPENAI_API_KEY, or name another endpoint with "
        "--base_url",
    )
    return key


def _text(completion: object) -> str:
    """What a completion says, or a BadReplyError that says why it says nothing."""
    if not isinstance(completion, ChatCompletion) or not completion.choices:
        raise BadReplyError("the endpoint sent no chat completion")
    choice = completion.choices[0]
    if choice.finish_reason == "content_filter":
        raise RefusalError("the endpoint's content filter stopped the reply")
    if getattr(choice.message, "refusal", None):
        raise RefusalError(f"the grader refused: {choice.message.refusal}")
    if choice.finish_reason == "length":
        raise BadReplyError("the reply was cut at the endpoint's limit of tokens")
    if not isinstance(choice.message.content, str):
        raise BadReplyError("the reply is empty")
    return choice.message.content
