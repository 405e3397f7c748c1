"""In an asyncio program: `python asyncio_server.py SOCKET` serves a disk, and tells at SOCKET.status how it is.

Requests of one client are carried out side by side, and answered as they are ready. A client that does not read is not
listened to: `drain` waits, and the session wants nothing while too much is unsent.
"""

from __future__ import annotations

import asyncio
import sys

import ram_disk

from nbdshard.common.errors import NbdshardError
from nbdshard.common.nbd.payload import in_memory
from nbdshard.server.handling import failure
from nbdshard.server.offers import NamedOffers
from nbdshard.server.serving import Request
from nbdshard.server.session import Session
from nbdshard.server.simple import Result, answer_to

under_way = 0
most_under_way = 0


async def handle_request(request: Request) -> Result:
    """As slow as a disk far away, of which others take no notice."""
    global under_way, most_under_way
    under_way += 1
    most_under_way = max(under_way, most_under_way)
    await asyncio.sleep(0.01)
    under_way -= 1
    return ram_disk.handle_request(request)


async def serve_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    session = Session(NamedOffers([ram_disk.EXPORT]), "client")
    something = asyncio.Event()  # has come, or is answered

    async def carry_out(request: Request) -> None:
        try:
            answer = answer_to(request, await handle_request(request))
        except Exception as error:
            answer = failure(request, error)
        assert session.device is not None
        answer(session.device)
        something.set()

    receiving: asyncio.Task[bytes] | None = None
    try:
        async with asyncio.TaskGroup() as group:
            while True:
                something.clear()
                requests = list(session.resume())
                if receiving is not None and receiving.done():
                    data, receiving = receiving.result(), None
                    if not data:
                        session.end_of_stream()
                        break
                    session.receive_target()[: len(data)] = data
                    requests += session.received(len(data))
                for request in requests:
                    group.create_task(carry_out(request))
                for piece in in_memory(session.data_to_send()):
                    writer.write(piece)
                    await writer.drain()
                    session.sent(len(piece))
                if session.finished:
                    break
                if receiving is None and (target := session.receive_target()):
                    receiving = group.create_task(reader.read(len(target)))
                    receiving.add_done_callback(lambda _: something.set())
                await something.wait()
            if receiving is not None:
                receiving.cancel()
    except* (NbdshardError, OSError):
        pass  # the client broke off, or the protocol
    finally:
        writer.close()


async def tell_status(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(f"{under_way} requests are under way; there have been {most_under_way} at once\n".encode())
    writer.close()


async def main(path: str) -> None:
    status = await asyncio.start_unix_server(tell_status, f"{path}.status")
    server = await asyncio.start_unix_server(serve_client, path)
    async with status, server:
        await server.serve_forever()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} SOCKET")
    asyncio.run(main(sys.argv[1]))
