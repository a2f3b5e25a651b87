// Uses the server at argv[2] with the model argv[3] as Node programs do, and prints what came as one JSON object.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [, , baseURL, model] = process.argv;
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 120_000 });
const Weather = z.object({ city: z.enum(["Paris", "Rome"]), warm: z.boolean() });
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const fields = { model, messages, max_completion_tokens: 200 };
const tools = [zodFunction({ name: "get_weather", parameters: Weather })];

async function chat() {
  const short = { ...fields, max_completion_tokens: 12, seed: 1 };
  const whole = await client.chat.completions.create(short);
  let text = "";
  let usage = null;
  for await (const chunk of await client.chat.completions.create({
    ...short,
    stream: true,
    stream_options: { include_usage: true },
  })) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { whole: whole.choices[0].message.content, streamed: text, tokens: usage.completion_tokens };
}

async function calls() {
  const asked = { ...fields, tools, tool_choice: "required", parallel_tool_calls: false };
  const whole = await client.chat.completions.parse(asked);
  const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
  return [whole, streamed].map((answer) => {
    const { finish_reason, message } = answer.choices[0];
    const [call] = message.tool_calls;
    return { finish_reason, name: call.function.name, arguments: call.function.parsed_arguments };
  });
}

async function structured() {
  const response_format = zodResponseFormat(Weather, "weather");
  const whole = await client.chat.completions.parse({ ...fields, response_format });
  const streamed = await client.chat.completions.stream({ ...fields, response_format }).finalChatCompletion();
  return [whole, streamed].map((answer) => answer.choices[0].message.parsed);
}

async function responses() {
  const asked = { model, input: messages, max_output_tokens: 200, text: { format: zodTextFormat(Weather, "weather") } };
  const whole = await client.responses.parse(asked);
  const streamed = await client.responses.stream(asked).finalResponse();
  return [whole, streamed].map((answer) => answer.output_parsed);
}

async function refused() {
  try {
    await client.chat.completions.create({ ...fields, frobnicate: true });
  } catch (error) {
    return { name: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
}

const report = {
  models: (await client.models.list()).data.map((entry) => entry.id),
  retrieved: (await client.models.retrieve(model)).id,
  chat: await chat(),
  calls: await calls(),
  structured: await structured(),
  responses: await responses(),
  refused: await refused(),
};
console.log(JSON.stringify(report));
