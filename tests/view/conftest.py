"""Motions, a small model and a client of the page that speaks viser's protocol over a real socket."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from scamo.config import ModelConfig, TokenizerConfig
from scamo.data.text import TextEncoder
from scamo.generation.api import ScaMo
from scamo.models.prefix_lm import PrefixLM
from scamo.motion.motion import Motion
from scamo.motion.skeleton import forward_kinematics
from scamo.tokenizers.autoencoder import FSQAutoencoder

WORDS = ["<pad>", "</s>", "<unk>", "a", "person", "walks", "jumps"]


@pytest.fixture
def make_motion():
    """A body at rest that is carried along the diagonal of the ground."""

    def make(frames=40, fps=20.0, metres=2.0, text=None):
        root = np.linspace([0, 0.3, 0], [metres, 0.3, metres], frames)
        rest = np.tile([1.0, 0, 0, 0], (frames, 22, 1))
        return Motion(forward_kinematics(rest, root=root), fps=fps, text=text)

    return make


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
    bert = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    encoder = TextEncoder("words", pieces, transformers.BertModel(bert).eval(), "cpu", 16)
    config = ModelConfig(
        size="", layers=2, heads=2, width=16, codes=25, text_width=12, max_text=16, max_motion=10
    )
    tokenizer = FSQAutoencoder(
        TokenizerConfig(levels=(5, 5), width=16, latent_width=8, depth=1),
        torch.zeros(263),
        torch.full((263,), 0.5),
    )
    return ScaMo(PrefixLM(config).eval(), tokenizer.eval(), encoder)


class Client:
    """What a browser does: it says where its camera is, and keeps the elements and the nodes it is sent."""

    def __init__(self, port):
        import viser
        from websockets.sync.client import connect

        protocol = f"viser-v{viser.__version__}"
        self.socket = connect(f"ws://127.0.0.1:{port}", subprotocols=[protocol], max_size=None)
        self.elements, self.nodes, self.notices, self.bytes = {}, {}, {}, b""
        self.send(
            "ViewerCameraMessage", wxyz=[1, 0, 0, 0], position=[3, 3, 3], fov=1.3, near=0.1, far=100.0,
            image_height=720, image_width=1280, look_at=[0, 0, 0], up_direction=[0, 1, 0],
        )  # fmt: skip

    def send(self, kind, **fields):
        import msgspec

        self.socket.send(msgspec.msgpack.encode({"type": kind, **fields}))

    def receive(self, timeout):
        """Take one packet; whether there was one in time."""
        import msgspec
        import zstandard

        try:
            packet = self.socket.recv(timeout=timeout)
        except TimeoutError:
            return False
        length = int.from_bytes(packet[8:16], "little")
        inner = zstandard.ZstdDecompressor().decompress(packet[16 : 16 + length])
        for message in msgspec.msgpack.decode(inner)["messages"]:
            self._take(message)
        return True

    def _take(self, message):
        kind, uuid, name = message["type"], message.get("uuid"), message.get("name")
        if kind == "GuiUpdateMessage":
            if uuid in self.elements:
                self.elements[uuid].update(message["updates"])
        elif kind == "GuiRemoveMessage":
            self.elements.pop(uuid, None)
        elif kind.startswith("Gui") and "props" in message:
            self.elements[uuid] = {**message["props"], "value": message.get("value")}
        elif kind in ("NotificationShowMessage", "NotificationUpdateMessage"):
            self.notices[uuid] = (message["props"]["title"], message["props"]["body"])
        elif kind == "RemoveSceneNodeMessage":
            self.nodes = {n: p for n, p in self.nodes.items() if n != name and not n.startswith(f"{name}/")}
        elif kind == "FileTransferStartDownload":
            self.file = message["filename"]
        elif name and "props" in message:
            self.nodes[name] = message["props"]

    def until(self, true, seconds=60):
        """Take packets until `true(self)` holds."""
        end = time.monotonic() + seconds
        while not true(self):
            assert self.receive(max(0.0, end - time.monotonic())), (self.elements, self.notices)
        return self

    def element(self, label):
        return next((e for e in self.elements.values() if e.get("label") == label), None)

    def set(self, label, value):
        uuid = next(uuid for uuid, e in self.elements.items() if e.get("label") == label)
        self.elements[uuid]["value"] = value
        self.send("GuiUpdateMessage", uuid=uuid, updates={"value": value})

    def click(self, label):
        self.set(label, True)

    def told(self, text):
        return any(text in body for _, body in self.notices.values())


@pytest.fixture
def connect():
    clients = []

    def open_one(server):
        clients.append(Client(server.get_port()))
        return clients[-1]

    yield open_one
    for client in clients:
        client.socket.close()
