// What the scripts share. Each is called with the address of a server's API, its key and the address of its metrics:
//   node NAME.mjs http://127.0.0.1:PORT/v1 KEY
// and prints a line per check. A check that fails ends the script with exit code 1 and the reason.
import assert from 'node:assert/strict';

export const [baseURL, apiKey] = process.argv.slice(2);
export const model = 'tiny';
export { assert };

export async function check(name, f) {
  try {
    await f();
    console.log(`ok ${name}`);
  } catch (e) {
    console.log(`FAILED ${name}`);
    console.log(e?.stack ?? e);
    process.exit(1);
  }
}

export async function metric(name) {
  const text = await (await fetch(baseURL.replace('/v1', '/metrics'), { headers: { authorization: `Bearer ${apiKey}` } })).text();
  const line = text.split('\n').find((l) => l.startsWith(`perigee_${name} `));
  assert(line, `the metrics hold no ${name}`);
  return Number(line.split(' ')[1]);
}

export async function eventually(f, within_ms = 5000) {
  for (const until = Date.now() + within_ms; Date.now() < until; await new Promise((r) => setTimeout(r, 20))) if (await f()) return;
  assert.fail('it did not come to be in time');
}

export const weather = {
  type: 'function',
  function: {
    name: 'get_weather',
    description: 'The weather of a city',
    parameters: {
      type: 'object',
      properties: { city: { type: 'string', enum: ['Paris', 'Rome'] }, days: { type: 'integer', minimum: 1, maximum: 9 } },
      required: ['city', 'days'],
      additionalProperties: false,
    },
  },
};

export function isWeather(args) {
  assert(['Paris', 'Rome'].includes(args.city) && Number.isInteger(args.days) && args.days >= 1 && args.days <= 9, JSON.stringify(args));
  assert.equal(Object.keys(args).length, 2);
}
