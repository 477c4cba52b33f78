// Answers as Markdown. Whatever an answer holds, only these elements and attributes come out: no images, styles, ids,
// forms, frames or scripts, and no class of the page's own.

import { DOMPurify, Marked, hljs } from "./vendor/vendor.js";

const TAGS = ("p br hr h1 h2 h3 h4 h5 h6 strong em del code pre span blockquote ul ol li table thead tbody tr th td a sup "
  + "sub kbd").split(" ");
const ATTRIBUTES = ["href", "class", "start", "align"];
const OWN_CLASSES = /^(hljs(-[\w-]+)?|language-[\w+#.-]+|[a-z]+_)$/; // of highlight.js
const LINKS = /^(https?:|mailto:)/i;

const escaped = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    code({ text, lang }) {
      const language = (lang ?? "").match(/^[\w+#.-]*/)[0];
      const known = hljs.getLanguage(language) && text.length < 50_000;
      const body = known ? hljs.highlight(text, { language, ignoreIllegals: true }).value : escaped(text);
      return `<pre><code class="language-${escaped(language || "text")}">${body}</code></pre>`;
    },
    html: ({ text }) => escaped(text), // an answer's HTML is shown, not run
    image: ({ text, href }) => escaped(`[${text || "image"}: ${href}]`),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

DOMPurify.addHook("uponSanitizeAttribute", (_, data) => {
  if (data.attrName === "class") data.attrValue = data.attrValue.split(/\s+/).filter((x) => OWN_CLASSES.test(x)).join(" ");
  if (data.attrName === "href" && !LINKS.test(data.attrValue)) data.keepAttr = false;
});
DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

const clean = (html) =>
  DOMPurify.sanitize(html, {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ATTRIBUTES,
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  });

/**
 * Shows a text that may still grow: blocks that are as before stay, so that selections hold and long answers are cheap.
 * @param decorate called with each new block's `pre` elements
 */
export function render(container, text, decorate) {
  const raws = (container.raws ??= []);
  const tokens = marked.lexer(text);
  const blocks = tokens.filter((token) => token.type !== "space" && token.type !== "def");
  blocks.forEach((token, i) => {
    if (raws[i] === token.raw) return;
    const block = document.createElement("div");
    const one = Object.assign([token], { links: tokens.links });
    block.append(clean(marked.parser(one)));
    block.querySelectorAll("pre").forEach(decorate);
    if (container.children[i]) container.children[i].replaceWith(block);
    else container.append(block);
    raws[i] = token.raw;
  });
  while (container.children.length > blocks.length) container.lastChild.remove();
  raws.length = blocks.length;
}
