// What an eye would object to on the page that is shown. Returns findings: [[kind, what, detail], …].
(() => {
  const found = [];
  const note = (kind, what, detail) => { if (found.length < 60) found.push([kind, String(what).trim().slice(0, 60), detail]); };
  const root = document.documentElement;

  // The page is as wide as the window; whatever is wider scrolls in a box of its own.
  if (root.scrollWidth > window.innerWidth) note("overflow", "page", `${root.scrollWidth} > ${window.innerWidth}`);
  for (const e of document.body.querySelectorAll("*")) {
    if (e.closest("svg") && e.tagName !== "svg") continue;
    const style = getComputedStyle(e);
    const clips = style.overflowX === "auto" || style.overflowX === "scroll";
    if (!clips && e.clientWidth && e.scrollWidth > e.clientWidth + 1) {
      note("overflow", e.tagName + "." + e.className, `${e.scrollWidth} > ${e.clientWidth}`);
    }
  }

  // Every piece of text, with its boxes and its size as seen.
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("title, desc, style, script")) continue;
    const style = getComputedStyle(parent);
    if (style.visibility === "hidden" || style.display === "none") continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const svg = parent.closest("svg");
    const boxes = [...range.getClientRects()].filter(b => b.width > 0 && b.height > 0);
    const scale = svg ? svg.getScreenCTM().a * (svg.viewBox.baseVal.width ? 1 : 1) : 1;
    const size = parseFloat(style.fontSize) * scale;
    if (boxes.length) texts.push({ node, parent, style, boxes, svg, size, sticky: !!parent.closest("th:first-child") });
  }
  const least = SMALLEST;
  for (const t of texts) if (t.size < least) note("small", t.node.data, `${t.size.toFixed(1)} px`);

  // No text covers another. A line of text is higher than its letters, so only the middle of it counts.
  const marks = texts.flatMap(t => t.boxes.map(b => {
    const upright = b.height <= 3 * t.size * 1.4 || !t.svg;
    const dy = upright ? 0.22 * b.height : 1, dx = upright ? 1 : 0.22 * b.width;
    return { t, left: b.left + dx, right: b.right - dx, top: b.top + dy, bottom: b.bottom - dy };
  })).sort((a, b) => a.top - b.top);
  for (let i = 0; i < marks.length; i++) {
    for (let j = i + 1; j < marks.length && marks[j].top < marks[i].bottom; j++) {
      const [a, b] = [marks[i], marks[j]];
      if (a.t.node === b.t.node || a.t.sticky !== b.t.sticky) continue;
      if (a.left < b.right && b.left < a.right) note("overlap", a.t.node.data, b.t.node.data.trim().slice(0, 40));
    }
  }
  // No dashed line of a drawing (a front, a curve) goes through a text; those of the grid are whole, and pale.
  for (const path of document.querySelectorAll("svg path")) {
    const style = getComputedStyle(path);
    if (style.strokeDasharray === "none" || style.stroke === "none" || path.closest("defs")) continue;
    const place = path.getScreenCTM(), length = path.getTotalLength(), svg = path.closest("svg");
    const own = marks.filter(m => m.t.svg === svg);
    for (let at = 0; at <= length; at += 2) {
      const p = path.getPointAtLength(at).matrixTransform(place);
      const hit = own.find(m => m.left + 1 < p.x && p.x < m.right - 1 && m.top < p.y && p.y < m.bottom);
      if (hit) { note("crossed", hit.t.node.data, "by a line"); break; }
    }
  }
  // No text is cut off by its drawing.
  for (const t of texts) {
    if (!t.svg) continue;
    const frame = t.svg.getBoundingClientRect();
    for (const b of t.boxes) {
      if (b.left < frame.left - 2 || b.right > frame.right + 2 || b.top < frame.top - 2 || b.bottom > frame.bottom + 2) {
        note("cut", t.node.data, "outside its drawing");
      }
    }
  }

  // Contrast of every text with what is drawn below it, as WCAG 2 counts it.
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  canvas.canvas.width = canvas.canvas.height = 1;
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const d = canvas.getImageData(0, 0, 1, 1).data;
    return [d[0], d[1], d[2], d[3] / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const luminance = c => {
    const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const paint = e => {
    const style = getComputedStyle(e);
    if (!(e instanceof SVGElement) || e.tagName === "svg") return rgba(style.backgroundColor);
    if (["text", "tspan", "g", "use"].includes(e.tagName) || style.fill === "none") return [0, 0, 0, 0];
    const colour = rgba(style.fill);
    colour[3] *= parseFloat(style.fillOpacity) * parseFloat(style.opacity);
    return colour;
  };
  const behind = (t, box) => {
    const stack = document.elementsFromPoint(box.left + box.width / 2, box.top + box.height / 2);
    let colour = rgba(getComputedStyle(document.body).backgroundColor);
    if (colour[3] < 1) colour = over(colour, matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0, 1] : [255, 255, 255, 1]);
    for (const e of stack.reverse()) if (e !== t.parent || !t.svg) colour = over(paint(e), colour);
    return { colour, hit: stack.includes(t.parent) };
  };
  let checked = 0;
  for (const t of texts) {
    const { colour, hit } = behind(t, t.boxes[0]);
    if (!hit) continue;  // scrolled out of its box
    checked += 1;
    const ink = over(rgba(t.svg ? t.style.fill : t.style.color), colour);
    const ratio = contrast(ink, colour);
    if (ratio < 4.5) note("contrast", t.node.data, ratio.toFixed(2));
  }
  // Marks of charts (points and lines that carry a method's colour) stand out from the page.
  const page = behind({ parent: null }, { left: 1, top: 1, width: 0, height: 0 }).colour;
  for (const use of document.querySelectorAll("svg use")) {
    const fill = rgba(getComputedStyle(use).fill), stroke = rgba(getComputedStyle(use).stroke);
    const seen = Math.max(...[fill, stroke].filter(c => c[3] > 0).map(c => contrast(over(c, page), page)), 1);
    if (seen < 3) note("contrast", "mark", seen.toFixed(2));
  }
  return { found, texts: texts.length, checked, pictures: document.querySelectorAll("svg").length };
})()
