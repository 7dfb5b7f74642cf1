// The @openai/agents package: the agent loop in the client, over responses and over chat completions.
import { Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, run, setTracingDisabled, tool } from '@openai/agents';
import OpenAI from 'openai';
import { z } from 'zod';
import { apiKey, assert, baseURL, check, model } from './common.mjs';

setTracingDisabled(true);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const models = { responses: new OpenAIResponsesModel(client, model), chat: new OpenAIChatCompletionsModel(client, model) };

for (const [api, backend] of Object.entries(models)) {
  const seed = { providerData: { seed: 21 } };

  await check(`${api}: an answer`, async () => {
    const agent = new Agent({ name: 'Plain', instructions: 'Be brief.', model: backend, modelSettings: { maxTokens: 12, ...seed } });
    const r = await run(agent, 'Hello');
    assert.equal(typeof r.finalOutput, 'string');
  });

  await check(`${api}: a tool`, async () => {
    const seen = [];
    const add = tool({
      name: 'add', description: 'Adds two numbers',
      parameters: z.object({ a: z.number().int().min(0).max(99), b: z.number().int().min(0).max(99) }),
      execute: async ({ a, b }) => { seen.push(a + b); return String(a + b); },
    });
    // The first tool's answer is the result: a model with random weights has nothing to add to it.
    const agent = new Agent({ name: 'Adder', instructions: 'Add.', model: backend, tools: [add], toolUseBehavior: 'stop_on_first_tool', modelSettings: { toolChoice: 'required', parallelToolCalls: false, maxTokens: 200, ...seed } });
    const r = await run(agent, 'What is 2 and 3?');
    assert.equal(seen.length, 1);
    assert.equal(r.finalOutput, String(seen[0]));
  });

  await check(`${api}: structured output`, async () => {
    const outputType = z.object({ answer: z.number().int().min(0).max(9), sure: z.boolean() });
    const agent = new Agent({ name: 'Shaped', instructions: 'Answer.', model: backend, outputType, modelSettings: { maxTokens: 200, ...seed } });
    const r = await run(agent, 'How many?');
    outputType.parse(r.finalOutput);
  });

  await check(`${api}: streaming`, async () => {
    const agent = new Agent({ name: 'Plain', instructions: 'Be brief.', model: backend, modelSettings: { maxTokens: 12, ...seed } });
    const r = await run(agent, 'Hello', { stream: true });
    let text = '';
    for await (const e of r) if (e.type === 'raw_model_stream_event' && e.data.type === 'output_text_delta') text += e.data.delta;
    await r.completed;
    assert.equal(text, r.finalOutput);
  });

  await check(`${api}: an error`, async () => {
    const agent = new Agent({ name: 'Plain', model: backend, modelSettings: { temperature: 9, ...seed } });
    await assert.rejects(() => run(agent, 'Hello'), (e) => e.status === 400 && e.param === 'temperature');
  });
}
