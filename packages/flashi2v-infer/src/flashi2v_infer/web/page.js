// Follows what is being sampled, and plays two videos in step. Buttons within the server's HTML reach it through `act`.
(() => {
  // Elements stay when Gradio shows another job in their place: what they follow is looked at, too.
  const followed = new WeakMap();
  const playing = new WeakSet();

  function follow(box) {
    const url = box.dataset.follow;
    followed.set(box, url);
    const source = new EventSource(url);
    const on = (name, use) => source.addEventListener(name, (event) => {
      if (!box.isConnected || box.dataset.follow !== url) return source.close();
      use(JSON.parse(event.data));
    });
    on("progress", (video) => {
      box.querySelector("progress").value = video.progress;
      const left = video.seconds_left === null ? "" : `, about ${Math.ceil(video.seconds_left)} s left`;
      box.querySelector(".state").textContent = video.status === "queued"
        ? `waiting, ${video.queue_position} before it`
        : `step ${video.step}${left}`;
    });
    on("preview", (preview) => {
      const picture = box.querySelector("img.preview");
      picture.src = preview.image;
      picture.dataset.step = preview.step;
      picture.hidden = false;
    });
    on("end", () => { source.close(); document.querySelector("#refresh")?.click(); });
  }

  function inStep(box) {
    const [first, second] = box.querySelectorAll("video");
    playing.add(first);
    const together = () => { if (Math.abs(first.currentTime - second.currentTime) > 0.03) second.currentTime = first.currentTime; };
    first.addEventListener("play", () => { together(); second.play(); });
    first.addEventListener("pause", () => { second.pause(); together(); });
    first.addEventListener("seeking", together);
    first.addEventListener("ratechange", () => { second.playbackRate = first.playbackRate; });
    // A loop starts both again: the shorter one waits for the longer.
    for (const video of [first, second]) video.addEventListener("ended", () => {
      if (first.ended && second.ended) { first.currentTime = second.currentTime = 0; first.play(); second.play(); }
    });
  }

  new MutationObserver(() => {
    for (const box of document.querySelectorAll("[data-follow]")) if (followed.get(box) !== box.dataset.follow) follow(box);
    for (const box of document.querySelectorAll("[data-in-step]")) if (!playing.has(box.querySelector("video"))) inStep(box);
  }).observe(document.documentElement, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-follow"] });
})();
