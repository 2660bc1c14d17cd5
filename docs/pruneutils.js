// Pictures that come in light and dark follow the palette that the reader has chosen, not only that of the system.
(() => {
  const sources = () => document.querySelectorAll('picture source[media*="prefers-color-scheme"], source[data-dark]');
  const follow = () => {
    const dark = document.body.getAttribute("data-md-color-scheme") === "slate";
    for (const source of sources()) {
      source.dataset.dark = "";
      source.media = dark ? "all" : "not all";
    }
  };
  new MutationObserver(follow).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
  follow();
})();
