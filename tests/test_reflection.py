"""A client that knows nothing but the address learns the whole contract from reflection, and speaks with it."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2

from protos.chorus.v1 import tts_pb2
from tests.stack import Server

pytestmark = pytest.mark.asyncio(loop_scope="module")

OWN = ("TextToSpeechService", "VoiceService", "ServerInfoService")
PLAIN = ("grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
ERROR_DETAILS = ("ErrorInfo", "BadRequest", "QuotaFailure", "RetryInfo", "DebugInfo")


class Reflection:
    """A client of server reflection, version `v1` or `v1alpha`: the two have the same messages on the wire."""

    def __init__(self, channel: grpc.aio.Channel, version: str) -> None:
        self.channel = channel
        self.pool = DescriptorPool()
        self._known: set[str] = set()
        self._method: Any = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )

    async def ask(self, **question: Any) -> Any:
        """The answer to one question."""
        call = self._method()
        await call.write(reflection_pb2.ServerReflectionRequest(**question))
        answer = await call.read()
        await call.done_writing()
        return answer

    async def services(self) -> set[str]:
        """The names of all services."""
        answer = await self.ask(list_services="")
        return {service.name for service in answer.list_services_response.service}

    async def learn(self, symbol: str) -> None:
        """Adds the file that has a symbol to the pool, with all that it imports."""
        await self._add(await self.ask(file_containing_symbol=symbol))

    async def _add(self, answer: Any) -> None:
        assert answer.WhichOneof("message_response") == "file_descriptor_response", answer
        for data in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            if file.name in self._known:
                continue
            self._known.add(file.name)
            for name in set(file.dependency) - self._known:
                await self._add(await self.ask(file_by_filename=name))
            self.pool.Add(file)

    async def call(self, service: str, method: str, **fields: Any) -> Any:
        """Calls a unary method by what was learned of it."""
        descriptor = self.pool.FindServiceByName(service).methods_by_name[method]
        request = message_factory.GetMessageClass(descriptor.input_type)(**fields)
        reply = message_factory.GetMessageClass(descriptor.output_type)
        multi: Any = self.channel.unary_unary(f"/{service}/{method}")
        return reply.FromString(await multi(request.SerializeToString()))


@pytest.fixture(params=["gateway", "service"])
def server(pair: tuple[Server, Server], request: pytest.FixtureRequest) -> Server:
    service, gateway = pair
    return gateway if request.param == "gateway" else service


@pytest_asyncio.fixture(loop_scope="module", params=["v1", "v1alpha"])
async def reflection(server: Server, request: pytest.FixtureRequest) -> Reflection:
    return Reflection(server.channel(), request.param)


async def test_every_service_is_listed_and_resolved(server: Server, reflection: Reflection) -> None:
    own = {f"chorus.v1.{name}" for name in (*OWN, *["JobService"] * (server.role == "gateway"))}
    assert await reflection.services() == own | set(PLAIN)
    for name in own | set(PLAIN):
        await reflection.learn(name)
        package = name.rpartition(".")[0]
        for method in reflection.pool.FindServiceByName(name).methods:
            for message in (method.input_type, method.output_type):
                assert message.full_name.startswith(package)
    for name in own:
        learned, known = reflection.pool.FindServiceByName(name), tts_pb2.DESCRIPTOR.pool.FindServiceByName(name)
        assert described(learned) == described(known)


def described(service: Any) -> descriptor_pb2.ServiceDescriptorProto:
    """A service as its file says it."""
    description = descriptor_pb2.ServiceDescriptorProto()
    service.CopyToProto(description)
    return description


async def test_what_was_learned_is_enough_to_call(reflection: Reflection) -> None:
    await reflection.learn("chorus.v1.TextToSpeechService")
    response = await reflection.call("chorus.v1.TextToSpeechService", "Synthesize", text="hi", voice="male1")
    assert len(response.audio) == 44 + 2 * response.end.sample_count
    await reflection.learn("grpc.health.v1.Health")
    assert (await reflection.call("grpc.health.v1.Health", "Check")).status == 1


@pytest.mark.parametrize("name", ERROR_DETAILS)
async def test_the_details_of_errors_are_resolved(reflection: Reflection, name: str) -> None:
    await reflection.learn(f"google.rpc.{name}")
    learned = reflection.pool.FindMessageTypeByName(f"google.rpc.{name}")
    assert list(learned.fields_by_name) == list(error_details_pb2.DESCRIPTOR.message_types_by_name[name].fields_by_name)


async def test_messages_and_methods_are_symbols_too(reflection: Reflection) -> None:
    for symbol in ("chorus.v1.AudioChunk", "chorus.v1.Codec", "chorus.v1.VoiceService.GetVoice"):
        await reflection.learn(symbol)
        # What the server gave has the symbol.
        reflection.pool.FindFileContainingSymbol(symbol.removesuffix(".GetVoice"))
    assert reflection.pool.FindEnumTypeByName("chorus.v1.Codec").values_by_name["CODEC_OPUS"].number == 2


@pytest.mark.parametrize("question", ["file_containing_symbol", "file_by_filename"])
async def test_what_is_not_there_is_not_found(reflection: Reflection, question: str) -> None:
    answer = await reflection.ask(**{question: "no.such.thing"})
    assert answer.error_response.error_code == 5
