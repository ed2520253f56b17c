// Wide parts are reached and scrolled by the keyboard; a figure opens in full.
const mark = () => {
  const places = ".text_html, .cell_output pre, .highlight pre, " +
    "div.math, .pst-scrollable-table-container, .picture";
  let n = 0;
  for (const place of document.querySelectorAll(places)) {
    const scrolls = place.scrollWidth > place.clientWidth + 1;
    place.classList.toggle("scrolls", scrolls);
    if (scrolls) {
      place.tabIndex = 0;
      place.setAttribute("role", "region");
      place.setAttribute("aria-label", `Wide part ${++n}, scrolls`);
    } else place.removeAttribute("tabindex");
  }
};
// A figure opens in full; on a small screen it scrolls, so that its words can be read.
const open = () => {
  for (const picture of document.querySelectorAll(
    ".cell_output img, figure img, img.turned")) {
    if (picture.closest("a")) continue;
    const link = document.createElement("a");
    link.href = picture.src;
    const frame = document.createElement("div");
    frame.className = "picture";
    picture.replaceWith(frame);
    frame.append(link);
    link.append(picture);
  }
};
// A page's own table scrolls by itself, too.
const frame = () => {
  for (const table of document.querySelectorAll(".bd-content article table")) {
    if (table.closest(".text_html, .pst-scrollable-table-container")) continue;
    const box = document.createElement("div");
    box.className = "pst-scrollable-table-container";
    table.replaceWith(box);
    box.append(table);
  }
};
// Paper cannot be unfolded.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const part of folded) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of folded) part.open = false;
});
addEventListener("DOMContentLoaded", open);
addEventListener("DOMContentLoaded", frame);
addEventListener("load", mark);
addEventListener("resize", mark);
