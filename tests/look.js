// Looks at pages in frames of several widths, from outside of them, so that each page is the very one that users get;
// writes what is wrong into the element "found", for tests/test_report.py.

function texts(page) {
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) if (walker.currentNode.data.trim()) found.push(walker.currentNode);
  return found;
}

function clipped(page, view) {
  const wrong = [];
  for (const node of texts(page)) {
    const said = node.data.trim();
    const svg = node.parentElement.closest("svg");
    const room = svg ? svg.getBoundingClientRect() : {left: 0, right: view.innerWidth, top: 0, bottom: Infinity};
    const range = page.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      const beside = box.left < room.left - 1 || box.right > room.right + 1;
      if (beside || box.top < room.top - 1 || box.bottom > room.bottom + 1) wrong.push(`clipped: ${said}`);
    }
    for (let up = node.parentElement; up && up !== page.body && !svg; up = up.parentElement) {
      const hides = view.getComputedStyle(up).overflowX !== "visible";
      if (hides && up.scrollWidth > up.clientWidth + 1) wrong.push(`hidden: ${said}`);
    }
  }
  for (const cell of page.querySelectorAll("td, th, dd, figcaption, .caption, pre"))
    if (cell.clientWidth && cell.scrollWidth > cell.clientWidth + 1) wrong.push(`too wide: ${cell.textContent.trim()}`);
  return wrong;
}

function overlapping(page) {
  const wrong = [];
  for (const chart of page.querySelectorAll("svg")) {
    const labels = [...chart.querySelectorAll(".label, .tick:not([transform]), .axis:not([transform])")];
    const boxes = labels.map(each => [each.textContent, each.getBoundingClientRect()]);
    boxes.forEach(([a, one], i) => boxes.slice(i + 1).forEach(([b, other]) => {
      const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
      const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
      // A line's box is higher than its letters.
      if (across > 1 && down > 4) wrong.push(`on each other: ${a}, ${b}`);
    }));
  }
  return wrong;
}

function figures(page) {
  const wrong = [];
  for (const figure of page.querySelectorAll("svg, img")) {
    const picture = figure.tagName === "IMG";
    const said = picture ? figure.alt : figure.getAttribute("role") === "img" && figure.getAttribute("aria-label");
    const box = figure.getBoundingClientRect();
    if (!said) wrong.push("a figure without a text alternative");
    if (!(box.width > 8 && box.height > 8)) wrong.push(`nothing to see: ${said} ${box.width} x ${box.height}`);
    if (picture && figure.naturalWidth === 0) wrong.push(`not decoded: ${said}`);
  }
  return wrong;
}

addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
    page.querySelectorAll("details").forEach(each => { each.open = true; });
    const wide = root.scrollWidth > view.innerWidth ? [`the page is ${root.scrollWidth} wide`] : [];
    return {
      width: view.innerWidth,
      texts: texts(page).length,
      figures: page.querySelectorAll("svg, img").length,
      wrong: [...wide, ...clipped(page, view), ...overlapping(page), ...figures(page)],
    };
  });
  document.getElementById("found").textContent = JSON.stringify(found);
});
