// Speaks through Chorus, knowing nothing but the .proto: each message of the stream as a line of JSON, bytes in base64.
// An error becomes a line of its own, with its details as they came.
//
// Usage: node client.js ADDRESS REQUEST_AS_JSON

import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const protos = fileURLToPath(new URL("../../../protos", import.meta.url));
const definition = protoLoader.loadSync("chorus/v1/tts.proto", {
  includeDirs: [protos],
  keepCase: true,
  longs: String,
  enums: String,
  oneofs: true,
});
const { TextToSpeechService } = grpc.loadPackageDefinition(definition).chorus.v1;

function bytesAsBase64(key, value) {
  return this[key] instanceof Buffer ? this[key].toString("base64") : value;
}

function print(kind, value) {
  console.log(JSON.stringify({ [kind]: value }, bytesAsBase64));
}

const [address, request] = process.argv.slice(2);
const client = new TextToSpeechService(address, grpc.credentials.createInsecure());
const call = client.StreamSynthesize(JSON.parse(request), { deadline: Date.now() + 60_000 });
call.on("data", (response) => print(response.message, response[response.message]));
call.on("error", ({ code, details, metadata }) =>
  print("error", { code, details, status: metadata.get("grpc-status-details-bin")[0] }),
);
call.on("close", () => client.close());
