#!/usr/bin/env python3
"""Two people chat through the mixnet. Needs `pip install websockets` and a running client (the option is to
come; until then a program opens the port with `WebsocketListener`):

    mixsocks client run --websocket 127.0.0.1:1977
    python3 examples/chat.py                    # shows your address, waits for the other one
    python3 examples/chat.py ADDRESS            # writes to ADDRESS, which can answer without knowing yours

With another port or a token: --url ws://127.0.0.1:1978/?token=...
"""

import argparse
import asyncio
import json
import sys

import websockets

REPLY_SURBS = 20


async def show_what_comes(socket, chat):
    async for text in socket:
        event = json.loads(text)
        if event["type"] == "selfAddress":
            print("you are", event["address"], flush=True)
        elif event["type"] == "received":
            chat["senderTag"] = event["senderTag"] or chat["senderTag"]
            print("<", event["message"])
        elif event["type"] in ("failed", "error"):
            print("!", event["message"], file=sys.stderr)


async def send_what_is_typed(socket, chat):
    number = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        number += 1
        request = {"message": line.rstrip("\n") or " ", "id": number}
        if chat["recipient"]:
            request |= {"type": "sendAnonymous", "recipient": chat["recipient"], "replySurbs": REPLY_SURBS}
        elif chat["senderTag"]:
            request |= {"type": "reply", "senderTag": chat["senderTag"]}
        else:
            print("! nobody has written yet", file=sys.stderr)
            continue
        await socket.send(json.dumps(request))


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("recipient", nargs="?")
    parser.add_argument("--url", default="ws://127.0.0.1:1977/")
    options = parser.parse_args()
    chat = {"recipient": options.recipient, "senderTag": None}
    async with websockets.connect(options.url, max_size=None) as socket:
        await socket.send('{"type":"selfAddress"}')
        coming = asyncio.create_task(show_what_comes(socket, chat))
        typing = asyncio.create_task(send_what_is_typed(socket, chat))
        await asyncio.wait({coming, typing}, return_when=asyncio.FIRST_COMPLETED)
        coming.cancel()


asyncio.run(main())
