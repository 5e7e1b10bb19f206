// Files of the folder, fetched with patience but not for ever, and promises that may take too long.

const asked = new URLSearchParams(globalThis.location?.search ?? '');
/** Seconds without a byte after which a file counts as lost; `?wait=60` in the address for more. */
export const PATIENCE = Number(asked.get('wait')) || 20;

/** The promise's value, or an error that says `sentence` after so many seconds. */
export function within(promise, seconds, sentence) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(sentence)), 1000 * seconds);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/** A file's bytes. told: called with (bytes so far, bytes in all or 0) while they arrive. */
export const fetchBytes = async (name, told) => (await fetchFile(name, told)).bytes;

/** The same with what the server says of them: {bytes, type, kept}, kept whether they may be cached. */
export function fetchFile(name, told = () => {}) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // unlike fetch, it tells of progress and is counted as unfinished
    const fail = (sentence) => {
      clearTimeout(timer);
      reject(new Error(`${name} ${sentence}`));
      request.abort();
    };
    const giveUp = () => fail(`does not arrive: nothing came for ${PATIENCE} s; reload the page`);
    let timer = setTimeout(giveUp, 1000 * PATIENCE);
    request.addEventListener('progress', ({ loaded, total, lengthComputable }) => {
      clearTimeout(timer);
      timer = setTimeout(giveUp, 1000 * PATIENCE);
      told(loaded, lengthComputable ? total : 0);
    });
    request.addEventListener('error', () => fail('cannot be fetched: the server is gone, or forbids it'));
    request.addEventListener('load', () => {
      if (request.status === 200) {
        clearTimeout(timer);
        const type = (request.getResponseHeader('content-type') ?? '').split(';')[0];
        const kept = !/no-store/.test(request.getResponseHeader('cache-control') ?? '');
        resolve({ bytes: new Uint8Array(request.response), type, kept });
      } else fail(`cannot be fetched (${request.status}); serve the folder as it was written`);
    });
    request.open('GET', new URL(name, document.baseURI));
    request.responseType = 'arraybuffer';
    request.send();
  });
}
