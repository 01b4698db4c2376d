"""`scamo view` and `scamo demo --model`: a viser server whose every client has a page of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import viser

from scamo.errors import ScaMoError
from scamo.motion.motion import Motion
from scamo.view.stage import Stage

HOST, PORT = "127.0.0.1", 8080


class Page(Protocol):
    """A client's; `close` runs in the server's event loop when the client has gone; it must not wait."""

    def close(self) -> None: ...


def view(files: Sequence[str | Path], *, host: str = HOST, port: int = PORT) -> None:
    """Show motion files side by side in a page, until Ctrl-C.

    Args:
        files: what Motion.load reads.
        host: address to listen at; the default is reachable from this machine only, "0.0.0.0" from anywhere.
        port: to listen at; 0 takes a free one.

    Raises:
        ScaMoError: no file, a file that is no motion, or an address that cannot be listened at.
    """
    motions, names = load_motions(files)
    with serving(lambda client: view_page(client, motions, names), host=host, port=port):
        wait(f"{len(motions)} motion{'s' if len(motions) > 1 else ''}")


def demo_page(run: str | Path, *, device: str = "auto", host: str = HOST, port: int = PORT) -> None:
    """A page that generates motions from sentences, until Ctrl-C.

    Args:
        run: a training run or an exported model.
        device: auto, cpu or cuda.
        host, port: as of `view`.

    Raises:
        ScaMoError: no model, or an address that cannot be listened at.
    """
    check_address(host, port)  # before the model takes its time to load
    from scamo.generation.api import ScaMo
    from scamo.view.prompt import Generator, PromptPage

    generator = Generator(ScaMo.load(run, device=device))
    try:
        with serving(lambda client: PromptPage(client, generator), host=host, port=port):
            wait(str(run))
    finally:
        generator.close()


def load_motions(files: Sequence[str | Path]) -> tuple[list[Motion], list[str]]:
    """Motions of files, and names for them: the files' own, numbered where there are several.

    Raises ScaMoError for no file, or as of Motion.load.
    """
    if not files:
        raise ScaMoError("no files: name at least one motion to view")
    motions = [Motion.load(file) for file in files]
    names = [Path(file).name for file in files]
    return motions, names if len(names) == 1 else [f"{i}. {name}" for i, name in enumerate(names, start=1)]


def view_page(client: viser.ClientHandle, motions: Sequence[Motion], names: Sequence[str]) -> Page:
    """The page of `scamo view`."""
    stage = Stage(client)
    stage.show(motions, names)
    return stage


@contextmanager
def serving(
    make_page: Callable[[viser.ClientHandle], Page], *, host: str = HOST, port: int = PORT
) -> Iterator[viser.ViserServer]:
    """A server that runs until the block is left; every client gets its own page.

    Raises ScaMoError as of `check_address`.
    """
    check_address(host, port)

    class Server(viser.ViserServer):
        def request_share_url(self, verbose: bool = True) -> None:
            """Never: any client could ask, and the page would be open to the internet."""

    server = Server(host=host, port=port, label="ScaMo", verbose=False)
    pages: dict[int, Page] = {}
    try:
        # viser takes the next free port where the one named is in use.
        if port not in (0, server.get_port()):
            raise ScaMoError(_in_use(host, port))
        # What is the same for all. Set by a client's handle, the axes would turn after its camera is placed.
        server.scene.set_up_direction("+y")
        server.gui.main_panel.dock_right()
        server.gui.configure_theme(show_logo=False, show_share_button=False)

        # Both run in the server's event loop, one after the other: no client can leave before it has a page.
        @server.on_client_connect
        async def _(client: viser.ClientHandle) -> None:
            pages[client.client_id] = make_page(client)

        @server.on_client_disconnect
        async def _(client: viser.ClientHandle) -> None:
            page = pages.pop(client.client_id, None)
            if page is not None:
                page.close()

        yield server
    finally:
        for page in list(pages.values()):
            page.close()
        server.stop()


def wait(what: str) -> None:
    """Say what is shown and return at Ctrl-C."""
    try:
        print(f"{what}; Ctrl-C ends it", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print()


def check_address(host: str, port: int) -> None:
    """Raises ScaMoError if nothing can listen there: a port in use, another machine's host, no such port."""
    if not 0 <= port <= 65535:
        raise ScaMoError(f"port = {port}: expected 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        why = str(error.strerror or error).split(" (")[0]  # what follows repeats the address
        raise ScaMoError(_in_use(host, port, f" ({why})")) from error


def _in_use(host: str, port: int, why: str = "") -> str:
    return f"host {host}, port {port}: cannot listen there{why}; name another one with --host or --port"
