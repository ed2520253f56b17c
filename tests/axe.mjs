// Every page of a built book in a real browser: axe, hidden width, smallest figure text.
// node tests/axe.mjs _build/site/html > data/benchmarks/axe.csv; see CONTRIBUTING.md.
import {createRequire} from "node:module";
import {readFileSync, readdirSync, statSync} from "node:fs";
import {join, relative, resolve} from "node:path";

const require = createRequire(resolve("_build/axe/package.json"));
const {chromium} = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const root = resolve(process.argv[2]);
const SMALLEST = 9;  // points of a figure's text, at 144 dots an inch
const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";

const found = readdirSync(root, {recursive: true})
  .filter(name => name.endsWith(".html") && /^book\//.test(name)).sort();
const report = process.argv.slice(3).map(name => relative(root, resolve(name)));
const browser = await chromium.launch({executablePath, args: ["--no-sandbox"]});
console.log("page,width,scheme,violations,rules,page_hidden_px,widest_hidden_px," +
  "smallest_text_px,height_px,kib");
let bad = 0;
for (const width of [1280, 390])
  for (const colorScheme of ["light", "dark"]) {
    const context = await browser.newContext({colorScheme, viewport: {width, height: 900}});
    for (const name of [...found, ...report]) {
      const page = await context.newPage();
      await page.goto("file://" + join(root, name));
      await page.evaluate(axe);
      const {violations} = await page.evaluate(() => globalThis.axe.run());
      const seen = await page.evaluate(points => {
        const pictures = [...document.querySelectorAll(".cell_output img")];
        const sizes = pictures.map(p => 2 * points * p.clientWidth / p.naturalWidth);
        const body = document.documentElement;
        const parts = [...document.querySelectorAll("table")].map(t => t.parentElement);
        const hidden = parts.map(p => p.scrollWidth - p.clientWidth);
        return [body.scrollWidth - innerWidth, Math.min(...sizes, 99), body.scrollHeight,
          Math.max(0, ...hidden)];
      }, SMALLEST);
      const rules = violations.map(v => `${v.id} ${v.nodes.length}`).join("; ");
      const kib = Math.round(statSync(join(root, name)).size / 1024);
      const text = seen[1] === 99 ? "" : seen[1].toFixed(1);
      console.log([name, width, colorScheme, violations.length, rules, seen[0], seen[3],
        text, seen[2], kib].join(","));
      bad += violations.length;
      await page.close();
    }
    await context.close();
  }
await browser.close();
process.exit(bad ? 1 : 0);
