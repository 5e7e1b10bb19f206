// Starts the page, or says at once why it cannot: opened as a file, scripts of the wrong type, rules
// of the server, files that do not arrive. No module, as browsers load none from a file.
'use strict';

(() => {
  const MODULES = ['app.js', 'drawing.js', 'fetching.js', 'inputs.js', 'media.js', 'model.js', 'preprocessing.js', 'runtime.js'];
  const patience = Number(new URLSearchParams(location.search).get('wait')) || 20;
  const $ = (id) => document.getElementById(id);
  const forbidden = new Set(); // directives of a Content-Security-Policy that stopped something

  function fail(sentence) {
    const words = [sentence];
    if (forbidden.size) {
      const rules = [...forbidden].join(', ');
      words.push(`The server's Content-Security-Policy forbids it (${rules}); the page needs script-src 'self' 'wasm-unsafe-eval', connect-src 'self' and style-src 'self'.`);
    }
    $('failure').textContent = words.join(' ');
    $('failure').hidden = false;
    $('subtitle').textContent = 'could not start';
    $('verdict').textContent = 'Self-check: could not run';
    $('verdict').className = 'bad';
    $('waiting').textContent = 'No prediction.';
    document.documentElement.dataset.state = 'failed';
  }

  /** Which module does not come, and why. */
  async function diagnose() {
    for (const name of MODULES) {
      const abort = new AbortController();
      const timer = setTimeout(() => abort.abort(), 1000 * patience);
      try {
        const answer = await fetch(name, { signal: abort.signal });
        const type = (answer.headers.get('content-type') ?? 'no type').split(';')[0];
        if (!answer.ok) return `${name} cannot be fetched (${answer.status}): serve the folder as it was written.`;
        if (!/javascript|ecmascript/.test(type)) {
          return `The server sends ${name} as ${type}, and browsers run modules only as text/javascript: set that type for .js.`;
        }
        await answer.text();
      } catch {
        if (abort.signal.aborted) return `${name} does not arrive: nothing came for ${patience} s; reload the page.`;
        return `${name} cannot be fetched: the server is gone, or forbids it.`;
      } finally {
        clearTimeout(timer);
      }
    }
    return '';
  }

  $('stuck').hidden = true; // it is for where not even this script runs
  document.addEventListener('securitypolicyviolation', ({ effectiveDirective }) => {
    if (/^(script|connect|worker)-src/.test(effectiveDirective)) forbidden.add(effectiveDirective);
  });
  if (location.protocol === 'file:') {
    $('served').hidden = false;
    fail('Opened as a file, a browser runs no model: this folder needs a web server, any will do.');
    return;
  }
  const late = setTimeout(async () => fail((await diagnose()) || `The page's scripts did not start within ${patience} s; reload the page.`), 1000 * patience);
  import('./app.js').then(
    (app) => {
      clearTimeout(late);
      return app.start().catch(async (error) => {
        await new Promise((resolve) => setTimeout(resolve, 50)); // violations are told after the error
        fail(error.message ?? String(error));
      });
    },
    async (error) => {
      clearTimeout(late);
      fail((await diagnose()) || `The page's scripts do not start: ${error.message}`);
    },
  );
})();
