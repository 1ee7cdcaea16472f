// Pictures open large on a click; the navigation follows the reading. The page is whole without this script.
(() => {
  const box = document.querySelector("dialog"), large = box.querySelector("img"), words = box.querySelector("p");
  const open = (img) => {
    large.src = img.src; large.alt = img.alt; words.textContent = img.alt;
    large.style.imageRendering = img.naturalWidth < 48 ? "pixelated" : "auto";
    box.showModal();
  };
  document.addEventListener("click", (event) => {
    if (box.open) box.close();
    else if (event.target.matches("img.zoom")) open(event.target);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches("img.zoom")) open(event.target);
  });
  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) {
      links.forEach((a) => a.classList.remove("here"));
      links.get(entry.target.id).classList.add("here");
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  document.querySelectorAll("section").forEach((section) => watch.observe(section));
})();
