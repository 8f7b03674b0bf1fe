"""The command line `chorus`.

Exit codes: 0 done, 1 the call failed, 2 wrong usage, 69 no server answers, 78 wrong settings or a process that cannot
start, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from client.client import DEFAULT_SECONDS, CallError, Client, Options, Tls
from client.say import FORMATS, SUFFIXES, Said, Wish, play, read_stdin, say, say_as_written
from common.errors import StartupError
from common.settings import Settings, load_settings

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78
EXIT_INTERRUPTED = 130

HELLO_TEXT = "你好，欢迎使用 Chorus。Hello, and welcome."
HELLO_FILE = Path("hello.wav")

app = typer.Typer(
    help="Chorus: text to speech over gRPC. Many voices, one forward pass.",
    epilog="Exit codes: 0 done, 1 the call failed, 2 wrong usage, 69 no server answers, "
    "78 wrong settings or a process that cannot start, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="NAME=VALUE", help="A setting, for example service.listen=0.0.0.0:50061."),
]
AddressOption = Annotated[
    str, typer.Option("--address", "-a", envvar="CHORUS_ADDRESS", help="Where Chorus listens: HOST:PORT.")
]
KeyOption = Annotated[
    str | None, typer.Option("--api-key", envvar="CHORUS_API_KEY", help="The key, where the gateway wants one.")
]
CaOption = Annotated[
    str | None,
    typer.Option("--ca", envvar="CHORUS_CA", help="Speak TLS: who signs the server (a PEM file), or `system`."),
]
CertificateOption = Annotated[
    Path | None,
    typer.Option("--certificate", envvar="CHORUS_CERTIFICATE", help="What to show: a PEM file, certificate and key."),
]
ParentOption = Annotated[int, typer.Option("--exit-with-parent", hidden=True)]
DEFAULT_ADDRESS = "127.0.0.1:50051"


@app.command()
def up(
    cards: Annotated[int, typer.Option(min=1, help="How many services to start: one for each card.")] = 1,
    engine: Annotated[str, typer.Option(help="espeak, chattts or tone.", envvar="CHORUS_ENGINE")] = "",
    hello: Annotated[bool, typer.Option(help=f"Speak a sentence to {HELLO_FILE} once it serves.")] = False,
    key: KeyOption = None,
    ca: CaOption = None,
    certificate: CertificateOption = None,
    set_: SetOption = [],  # noqa: B006 (typer reads it)
) -> None:
    """Start a service for each card and a gateway, here, until Ctrl-C. Key, CA and certificate are for --hello."""
    from client.up import up as start

    settings = load_settings([*set_, *([f"engine={engine}"] if engine else [])])

    async def then() -> None:
        if hello:
            async with _client(settings.gateway.listen, key, ca, certificate) as client:
                _print_said(await say(client, HELLO_TEXT, HELLO_FILE, Wish(), stream=True, console=err))
        _print_next_steps(settings)

    _run(start(settings, cards, err, then), settings.gateway.listen)


@app.command()
def service(set_: SetOption = [], exit_with_parent: ParentOption = 0) -> None:  # noqa: B006
    """Run one service: the process that owns an engine."""
    _follow_parent(exit_with_parent)
    from service.server import main

    main(load_settings(set_))


@app.command()
def gateway(set_: SetOption = [], exit_with_parent: ParentOption = 0) -> None:  # noqa: B006
    """Run one gateway: the process that callers talk to."""
    _follow_parent(exit_with_parent)
    from gateway.server import main

    main(load_settings(set_))


@app.command(name="say")
def say_command(
    text: Annotated[str, typer.Argument(help="What to say; - to say what is typed or piped in, as it comes.")] = "",
    file: Annotated[
        Path | None, typer.Option("--file", "-f", exists=True, dir_okay=False, help="Say what is in this file.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write. Default: chorus, by the format's name.")
    ] = None,
    voice: Annotated[str, typer.Option(help="A name that `chorus voices` lists.")] = "",
    language: Annotated[str, typer.Option(help="BCP 47, for example zh-CN, yue, en-US. Default: detected.")] = "",
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}. Default: by the file's.")] = "",
    rate: Annotated[int, typer.Option(help="Samples a second, 8000 to 48000. Default: the engine's.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Ask for a stream, also for a short text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not play it.")] = False,
    address: AddressOption = DEFAULT_ADDRESS,
    key: KeyOption = None,
    ca: CaOption = None,
    certificate: CertificateOption = None,
) -> None:
    """Speak a text into a file, and play it where there is a player and a terminal."""
    if bool(text) == (file is not None):
        raise typer.BadParameter("give a text, - for standard input, or a file with -f")
    wish = Wish(voice, language, format or _format_of(output), rate)
    if wish.format not in FORMATS:
        raise typer.BadParameter(f"--format {wish.format} is not known; there are {', '.join(FORMATS)}")
    path = output or Path(f"chorus.{SUFFIXES.get(wish.format, wish.format)}")
    words = _read(file) if file is not None else text

    async def call() -> None:
        async with _client(address, key, ca, certificate) as client:
            if text == "-":
                said = await say_as_written(client, read_stdin(), path, wish, console=err)
            else:
                said = await say(client, words, path, wish, stream=stream, console=err)
            _print_said(said)
            if not quiet:
                await play(path)

    _run(call(), address)


@app.command()
def normalize(
    text: Annotated[str, typer.Argument(help="What would be said.")] = "",
    file: Annotated[
        Path | None, typer.Option("--file", "-f", exists=True, dir_okay=False, help="Read what is in this file.")
    ] = None,
    language: Annotated[str, typer.Option(help="BCP 47. Default: detected.")] = "",
    address: AddressOption = DEFAULT_ADDRESS,
    key: KeyOption = None,
    ca: CaOption = None,
    certificate: CertificateOption = None,
) -> None:
    """Show how a text would be read: its segments, their words, and what nobody can speak."""
    if bool(text) == (file is not None):
        raise typer.BadParameter("give a text, or a file with -f")
    words = _read(file) if file is not None else text

    async def call() -> None:
        async with _client(address, key, ca, certificate) as client:
            response = await client.normalize(words, language=language)
            table = Table("bytes", "language", "spoken as", box=None, header_style="bold")
            for part in response.segments:
                table.add_row(f"{part.start_byte}-{part.end_byte}", part.language, Text(part.spoken_text))
            out.print(table)
            for rejected in response.rejected_characters:
                err.print(f"byte {rejected.start_byte}: nobody can speak {rejected.character!r}", style="yellow")

    _run(call(), address)


@app.command()
def voices(
    address: AddressOption = DEFAULT_ADDRESS,
    key: KeyOption = None,
    ca: CaOption = None,
    certificate: CertificateOption = None,
) -> None:
    """List the voices."""

    async def call() -> None:
        async with _client(address, key, ca, certificate) as client:
            table = Table("voice", "sounds like", "speaks", box=None, header_style="bold")
            for voice in await client.voices():
                table.add_row(voice.name, voice.description, " ".join(voice.languages))
            out.print(table)

    _run(call(), address)


@app.command()
def check(
    address: AddressOption = DEFAULT_ADDRESS,
    key: KeyOption = None,
    ca: CaOption = None,
    certificate: CertificateOption = None,
) -> None:
    """Have a word spoken, and fail if it is not: a health check that goes all the way."""

    async def call() -> None:
        async with _client(address, key, ca, certificate, timeout=10.0) as client:
            # Not from the cache: an engine must answer.
            response = await client.synthesize("你好", options=Options(cache_control="no-store"))
            out.print(f"ok: {response.start.engine}, {response.end.sample_count} samples")

    _run(call(), address)


@app.command()
def config(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Show the settings in effect, with secrets masked. In a file they go as shown; see README for the environment."""
    values = json.loads(load_settings(set_).model_dump_json())
    if as_json:
        out.print_json(json.dumps(values))
        return
    lines = [_toml_line(name, value) for name, value in values.items() if not isinstance(value, dict)]
    for name, section in values.items():
        if isinstance(section, dict):
            lines += ["", f"[{name}]", *(_toml_line(leaf, value) for leaf, value in section.items())]
    out.print("\n".join(lines), markup=False, highlight=False)


@app.command()
def key() -> None:
    """Make an API key, and the line that puts it into the tenants' file."""
    from gateway.tenants import hashed, new_key

    made = new_key()
    out.print(made, highlight=False, soft_wrap=True)
    err.print("This is the only time that it is shown. In the tenants' file it is:")
    err.print(f'keys = ["{hashed(made)}"]', markup=False, highlight=False, soft_wrap=True)


@app.command()
def tenants(set_: SetOption = []) -> None:  # noqa: B006
    """Show the tenants, and what is left of each limit on all gateways together."""
    from client.tenants import show_tenants

    asyncio.run(show_tenants(load_settings(set_), out))


cache_app = typer.Typer(help="Look into the result cache, and forget what is in it.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


@cache_app.command()
def stats(set_: SetOption = []) -> None:  # noqa: B006
    """Show what the cache's store holds."""
    from client.cache import show_cache

    asyncio.run(show_cache(load_settings(set_), out))


@cache_app.command()
def purge(
    all_: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
    voice: Annotated[str, typer.Option(help="What was spoken by this voice.")] = "",
    revision: Annotated[str, typer.Option(help="What was made by this revision, as the gateway's log tells it.")] = "",
    key: Annotated[str, typer.Option(help="One speech; with its --voice and --revision.")] = "",
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Forget speeches, on all gateways, within a second."""
    from client.cache import purge_cache

    if key:
        what = f"key:{key}"
        if not (voice and revision):
            raise typer.BadParameter("--key wants its --voice and --revision too")
    elif [all_, bool(voice), bool(revision)].count(True) != 1:
        raise typer.BadParameter("give one of --all, --voice, --revision and --key")
    else:
        what = "all" if all_ else f"voice:{voice}" if voice else f"revision:{revision}"
    asyncio.run(purge_cache(load_settings(set_), what, voice, revision))
    out.print("forgotten; gateways that run notice within a second")


@app.command()
def warm(
    file: Annotated[
        Path, typer.Option("--file", "-f", exists=True, dir_okay=False, help="A text on each line; # begins a comment.")
    ],
    voice: Annotated[str, typer.Option(help="A name that `chorus voices` lists.")] = "",
    language: Annotated[str, typer.Option(help="BCP 47. Default: detected.")] = "",
    address: AddressOption = DEFAULT_ADDRESS,
    key: KeyOption = None,
    ca: CaOption = None,
    certificate: CertificateOption = None,
) -> None:
    """Have texts spoken into the cache, before anybody asks for them."""
    from client.cache import read_texts
    from client.cache import warm as fill

    try:
        texts = read_texts(file)
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{file} is not UTF-8 text") from None

    async def call() -> None:
        async with _client(address, key, ca, certificate) as client:
            await client.server_info()  # whether anybody is there
            warmed = await fill(client, texts, voice, language, err)
        out.print(f"{warmed.made} made, {warmed.there} were there, {len(warmed.failed)} failed")
        for text, why in warmed.failed:
            err.print(f"{text[:60]}: {why}", style="red", markup=False)
        if warmed.failed:
            raise typer.Exit(EXIT_FAILED)

    _run(call(), address)


def _client(
    address: str, key: str | None, ca: str | None, certificate: Path | None, timeout: float = DEFAULT_SECONDS
) -> Client:
    """A client as the options say."""
    tls = None
    if ca is not None or certificate is not None:
        tls = Tls(None if ca in (None, "system") else Path(str(ca)), certificate, certificate)
    return Client(address, api_key=key, tls=tls, timeout=timeout)


def _toml_line(name: str, value: Any) -> str:
    return f"# {name} is not set" if value is None else f"{name} = {json.dumps(value)}"


def _run(work: Coroutine[Any, Any, None], address: str) -> None:
    """Runs a command, and turns what went wrong into words and an exit code."""
    try:
        asyncio.run(work)
    except CallError as error:
        _explain(error, address)
        unreachable = error.code is grpc.StatusCode.UNAVAILABLE and not error.reason
        raise typer.Exit(EXIT_UNAVAILABLE if unreachable else EXIT_FAILED) from None
    except OSError as error:
        err.print(f"{error.filename}: {error.strerror}", style="red", markup=False)
        raise typer.Exit(EXIT_FAILED) from None


def _explain(error: CallError, address: str) -> None:
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        err.print(_unreachable(error.message, address), style="red", markup=False)
        return
    if error.fields:
        for name, description in error.fields.items():
            err.print(f"{name} {description}", style="red", markup=False)
        return
    err.print(f"{error.message} ({error.code.name})", style="red", markup=False)
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        err.print("give it with --api-key or in CHORUS_API_KEY", style="red", markup=False)


def _unreachable(said: str, address: str) -> str:
    """What gRPC says of a connection that failed, for people."""
    if "handshake" in said.lower():
        return f"no TLS with {address}: it speaks none, or shows a certificate that --ca does not believe"
    if "socket closed" in said.lower() or "reset by peer" in said.lower():
        return f"{address} hangs up: does it speak TLS? Then say who signed it with --ca FILE, or --ca system"
    return f"nothing answers at {address}; start Chorus with `chorus up`, or name it with --address"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{file} is not UTF-8 text") from None


def _format_of(output: Path | None) -> str:
    """The format that a file's name asks for."""
    suffix = output.suffix.lstrip(".").lower() if output is not None else ""
    return next((name for name in FORMATS if suffix in (name, SUFFIXES.get(name))), "wav")


def _print_said(said: Said) -> None:
    out.print(
        f"{said.path}: {said.seconds:.2f} s of speech by {said.start.engine}, "
        f"first audio after {said.first_audio_ms:.0f} ms, all after {said.total_ms:.0f} ms",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if said.cut:
        err.print("a part was longer than the engine speaks at once, and is cut", style="yellow")


def _print_next_steps(settings: Settings) -> None:
    address = settings.gateway.listen
    method = "chorus.v1.TextToSpeechService/Synthesize"
    out.print(
        f"""
Chorus serves on {address} with the {settings.engine} engine. Try, in another terminal:

  chorus say "你好" -o hello.wav
  chorus voices
  grpcurl -plaintext -d '{{"text": "你好"}}' {address} {method} \\
    | sed -n 's/.*"audio": *"\\([^"]*\\)".*/\\1/p' | base64 -d > hello.wav
  buf curl --protocol grpc --http2-prior-knowledge -d '{{"text": "你好"}}' http://{address}/{method}

Ctrl-C stops everything.""",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _follow_parent(parent: int) -> None:
    if parent:
        from common.process import exit_with_parent

        exit_with_parent(parent)


def main() -> None:
    """Runs the command line."""
    try:
        app()
    except StartupError as error:
        err.print(str(error), style="red", markup=False)
        sys.exit(EXIT_CONFIG)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
