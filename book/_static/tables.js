// A table that is wider than its column can be reached and scrolled by the keyboard.
const mark = () => {
  const places = ".cell_output .text_html, .cell_output pre, .highlight pre, " +
    "div.math, .pst-scrollable-table-container";
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
addEventListener("load", mark);
addEventListener("resize", mark);
