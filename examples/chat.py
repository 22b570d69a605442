#!/usr/bin/env python3
"""Two people chat through the mixnet. Needs `pip install websockets` (or Debian's python3-websockets), and a
client for each:

    mixsocks up --data-dir /tmp/network --websocket 127.0.0.1:1977
    mixsocks client run --data-dir /tmp/bert --socks 127.0.0.1:1081 --websocket 127.0.0.1:1978 \
        --topology /tmp/network/topology --authority "$(cat /tmp/network/authority.pub)"
    python3 examples/chat.py                    # shows an address, waits for the other one
    python3 examples/chat.py --url ws://127.0.0.1:1978/ ADDRESS
                                                # writes to ADDRESS, which can answer without knowing who it is

On a network of many machines `mixsocks client run --websocket 127.0.0.1:1977` takes the place of `up`. With a
token: --url ws://127.0.0.1:1977/?token=...
"""

import argparse
import asyncio
import json
import sys

import websockets

REPLY_SURBS = 20


class Chat:
    def __init__(self, recipient):
        self.recipient = recipient
        self.sender_tag = None
        self.sent = 0
        self.under_way = set()
        self.all_told = asyncio.Event()
        self.all_told.set()

    async def show_what_comes(self, socket):
        async for text in socket:
            event = json.loads(text)
            if event["type"] == "selfAddress":
                print("you are", event["address"], flush=True)
            elif event["type"] == "received":
                self.sender_tag = event["senderTag"] or self.sender_tag
                # Strangers write it: a terminal must not obey it.
                print("<", "".join(c if c.isprintable() else "?" for c in event["message"]), flush=True)
            elif event["type"] in ("failed", "error"):
                print("!", event["message"], file=sys.stderr)
            self.under_way.discard(event.get("id"))
            if not self.under_way:
                self.all_told.set()

    async def send_what_is_typed(self, socket):
        while line := await asyncio.to_thread(sys.stdin.readline):
            if line := line.rstrip("\n"):
                await self.send(socket, line)
        await self.all_told.wait()

    async def send(self, socket, line):
        request = {"message": line, "id": self.sent}
        if self.recipient:
            request |= {"type": "sendAnonymous", "recipient": self.recipient, "replySurbs": REPLY_SURBS}
        elif self.sender_tag:
            request |= {"type": "reply", "senderTag": self.sender_tag}
        else:
            print("! nobody has written yet", file=sys.stderr)
            return
        self.under_way.add(self.sent)
        self.all_told.clear()
        self.sent += 1
        await socket.send(json.dumps(request))


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("recipient", nargs="?")
    parser.add_argument("--url", default="ws://127.0.0.1:1977/")
    options = parser.parse_args()
    chat = Chat(options.recipient)
    async with websockets.connect(options.url, max_size=None) as socket:
        await socket.send('{"type":"selfAddress"}')
        coming = asyncio.create_task(chat.show_what_comes(socket))
        typing = asyncio.create_task(chat.send_what_is_typed(socket))
        await asyncio.wait({coming, typing}, return_when=asyncio.FIRST_COMPLETED)
        coming.cancel()


asyncio.run(main())
