// Writes vendor.js, and vendor.txt with versions and licenses, to the folder that the server serves.
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = join(here, "..", "lightning_rlhf", "serving", "static", "vendor");

const read = (name) => {
  const folder = join(here, "node_modules", name);
  const about = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
  const licenses = readdirSync(folder).filter((file) => /^licen[sc]e/i.test(file)).sort();
  const texts = licenses.map((file) => readFileSync(join(folder, file), "utf8").trim());
  return `${name} ${about.version} (${about.license})\n\n${texts.join("\n\n")}\n`;
};

const { metafile } = await build({
  entryPoints: [join(here, "vendor.js")],
  outfile: join(out, "vendor.js"),
  bundle: true,
  format: "esm",
  target: "es2022",
  minify: true,
  charset: "utf8",
  legalComments: "none", // they are in vendor.txt
  banner: { js: "// marked, DOMPurify and highlight.js, made by `make web`; vendor.txt has versions and licenses" },
  metafile: true,
});
const names = new Set(
  Object.keys(metafile.inputs).map((path) => path.match(/node_modules\/((?:@[^/]+\/)?[^/]+)/)?.[1]).filter(Boolean),
);
const text = [...names].sort().map(read).join(`\n${"-".repeat(80)}\n\n`);
writeFileSync(join(out, "vendor.txt"), `vendor.js contains these packages.\n\n${text}`);
