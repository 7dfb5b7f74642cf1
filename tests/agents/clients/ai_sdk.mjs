// The ai package with @ai-sdk/openai-compatible.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from 'ai';
import { z } from 'zod';
import { apiKey, assert, baseURL, check, eventually, metric, model } from './common.mjs';

const provider = createOpenAICompatible({ name: 'perigee', baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: true });
const tiny = provider(model);
const schema = z.object({ city: z.enum(['Paris', 'Rome']), days: z.number().int().min(1).max(9) });

await check('generateText', async () => {
  const r = await generateText({ model: tiny, system: 'Be brief.', prompt: 'Hello', maxOutputTokens: 12, seed: 2, maxRetries: 0 });
  assert.equal(typeof r.text, 'string');
  assert(['stop', 'length'].includes(r.finishReason), r.finishReason);
  assert(r.usage.inputTokens > 0 && r.usage.outputTokens > 0);
});

await check('streamText', async () => {
  const ask = { model: tiny, prompt: 'Hello', maxOutputTokens: 25, seed: 2, maxRetries: 0 };
  const whole = await generateText(ask);
  const r = streamText({ ...ask, onError: ({ error }) => assert.fail(error) });
  let text = '';
  for await (const part of r.textStream) text += part;
  assert.equal(text, whole.text);
  assert.equal((await r.usage).outputTokens, whole.usage.outputTokens);
});

await check('tools', async () => {
  let ran = 0;
  const weather = tool({ description: 'The weather', inputSchema: schema, execute: async ({ city }) => (++ran, { city, sky: 'grey' }) });
  const ask = { model: tiny, prompt: 'Weather?', tools: { weather }, toolChoice: 'required', maxOutputTokens: 300, seed: 11, maxRetries: 0 };
  const r = await generateText({ ...ask, stopWhen: stepCountIs(2) });
  assert.equal(r.steps.length, 2);
  assert(ran >= 2, 'each step has to call');
  assert.equal(r.steps[0].finishReason, 'tool-calls');
  schema.parse(r.steps[0].toolCalls[0].input);
  const s = streamText({ ...ask, onError: ({ error }) => assert.fail(error) });
  const types = new Set();
  for await (const part of s.fullStream) types.add(part.type);
  for (const t of ['tool-input-start', 'tool-input-delta', 'tool-call', 'tool-result', 'finish']) assert(types.has(t), t);
});

await check('generateObject and streamObject', async () => {
  const ask = { model: tiny, schema, prompt: 'A trip', maxOutputTokens: 300, seed: 3, maxRetries: 0 };
  const r = await generateObject(ask);
  schema.parse(r.object);
  const s = streamObject({ ...ask, onError: ({ error }) => assert.fail(error) });
  for await (const part of s.partialObjectStream) assert.equal(typeof part, 'object');
  assert.deepEqual(await s.object, r.object);
});

await check('errors', async () => {
  await assert.rejects(() => generateText({ model: provider('nothing'), prompt: 'x', maxRetries: 0 }), (e) => {
    assert(APICallError.isInstance(e), e);
    assert.equal(e.statusCode, 404);
    assert.match(e.message, /does not exist/);
    return true;
  });
  await assert.rejects(() => generateText({ model: tiny, prompt: 'x', temperature: 9, maxRetries: 0 }), (e) => e.statusCode === 400);
});

await check('cancellation', async () => {
  const before = await metric('disconnected_total');
  const controller = new AbortController();
  const s = streamText({ model: tiny, prompt: 'Hello', maxOutputTokens: 3000, seed: 1, providerOptions: { perigee: { ignore_eos: true } }, abortSignal: controller.signal, maxRetries: 0, onError: () => {} });
  let n = 0;
  for await (const part of s.fullStream) if (part.type === 'text-delta' && ++n === 3) controller.abort();
  await eventually(async () => (await metric('disconnected_total')) > before);
});
