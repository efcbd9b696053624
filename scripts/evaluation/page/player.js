// The videos of one prompt, played together: the first leads, the others follow it to within a frame.

function startPlayer(clips) {
  let clip = null;
  let videos = [];
  let playing = false;
  let waiting = null; // the frame to go to once the present seek is done
  let addresses = [];
  const [play, slider, time, loop, rate] = ["play", "frame", "time", "loop", "rate"].map(byId);

  const frameOf = (video) => within(Math.floor(video.currentTime * clip.fps + 1e-3), clip.frames);
  const label = (entry) => (entry.seed === null ? entry.prompt : `${entry.prompt}, seed ${entry.seed}`);
  const sources = new Set(clips.map((entry) => entry.source));

  function chooseClip(number) {
    clip = clips[number];
    byId("prompt").textContent = label(clip);
    const settings = Object.keys(clip.differences);
    fillSelect("setting", settings, (chosen) => show(settings[chosen]));
    show(settings[0]);
  }

  function show(setting) {
    pause();
    addresses.forEach(URL.revokeObjectURL);
    const names = setting === undefined ? Object.keys(clip.videos) : [clip.reference, setting];
    const shown = names.map((name) => [name, clip.videos[name], metrics(name)]);
    if (setting !== undefined) shown.push(["difference", clip.differences[setting], `× ${clip.amplify}`]);
    const stage = byId("stage");
    stage.style.setProperty("--videos", Math.min(shown.length, 4));
    stage.classList.toggle("wide", clip.width > 1.4 * clip.height);
    videos = shown.map(([name, address]) => makeVideo(name, address));
    addresses = videos.map((video) => video.src);
    stage.replaceChildren(...shown.map(([name, , words], i) => framed(videos[i], name, words)));
    videos[0].addEventListener("ended", ended);
    waiting = null;
    slider.max = clip.frames - 1;
    say(0);
    seek(0);
  }

  function makeVideo(name, address) {
    const bytes = Uint8Array.from(atob(address.slice(address.indexOf(",") + 1)), (c) => c.charCodeAt(0));
    const video = make("video", { preload: "auto", playsinline: "", width: clip.width, height: clip.height });
    video.muted = true;
    video.classList.toggle("small", clip.width < 200);
    video.setAttribute("aria-label", `${name}: ${clip.prompt}`);
    video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
    return video;
  }

  function framed(video, name, words) {
    return make("figure", {}, [video, make("figcaption", {}, [make("strong", {}, [name]), make("span", {}, [words])])]);
  }

  function metrics(name) {
    if (name === clip.reference) return "reference";
    const values = clip.metrics[name] || {};
    const parts = [["psnr", "PSNR", " dB"], ["ssim", "SSIM", ""], ["lpips", "LPIPS", ""]];
    const known = parts.filter(([key]) => values[key] !== null && values[key] !== undefined);
    return known.map(([key, words, unit]) => `${words} ${figures(values[key])}${unit}`).join(" · ");
  }

  function say(frame) {
    slider.value = frame;
    slider.setAttribute("aria-valuetext", `frame ${frame + 1} of ${clip.frames}`);
    time.textContent = `${frame + 1} / ${clip.frames} · ${(frame / clip.fps).toFixed(2)} s`;
  }

  /** Shows a frame, given from 0, in all videos; a later call overtakes one that waits. */
  async function seek(frame) {
    const busy = waiting !== null;
    waiting = frame;
    if (busy) return;
    const mine = videos;
    for (let done = null; done !== waiting && mine === videos; ) {
      done = waiting;
      await Promise.all(mine.map((video) => moved(video, (done + 0.5) / clip.fps)));
    }
    if (mine === videos) waiting = null;
  }

  function moved(video, at) {
    return new Promise((resolve) => {
      const go = () => {
        video.addEventListener("seeked", resolve, { once: true });
        video.addEventListener("error", resolve, { once: true });
        video.currentTime = at;
      };
      if (video.readyState > 0) go();
      else video.addEventListener("loadedmetadata", go, { once: true });
    });
  }

  function pause() {
    playing = false;
    videos.forEach((video) => video.pause());
    play.textContent = "Play";
  }

  async function start() {
    playing = true;
    play.textContent = "Pause";
    if (frameOf(videos[0]) >= clip.frames - 1) await seek(0);
    if (!playing) return;
    videos.forEach((video) => (video.playbackRate = Number(rate.value)));
    await Promise.all(videos.map((video) => video.play().catch(() => undefined)));
    requestAnimationFrame(follow);
  }

  function follow() {
    if (!playing) return;
    const [first, ...others] = videos;
    for (const video of others) {
      const ahead = (video.currentTime - first.currentTime) * clip.fps; // in frames
      if (Math.abs(ahead) > 0.9 && !video.seeking && !video.ended) video.currentTime = first.currentTime;
      video.playbackRate = Number(rate.value) * (1 - Math.min(Math.max(ahead / 4, -0.2), 0.2));
    }
    say(frameOf(first));
    requestAnimationFrame(follow);
  }

  async function ended() {
    if (!playing) return;
    pause();
    say(clip.frames - 1);
    if (loop.checked) await start();
  }

  function step(by) {
    pause();
    say(within(Number(slider.value) + by, clip.frames));
    seek(Number(slider.value));
  }

  play.onclick = () => (playing ? pause() : start());
  byId("back").onclick = () => step(-1);
  byId("forward").onclick = () => step(1);
  slider.oninput = () => step(0);
  rate.onchange = () => videos.forEach((video) => (video.playbackRate = Number(rate.value)));
  byId("player").addEventListener("keydown", (event) => {
    const own = event.target.closest("button, select, input[type=checkbox]");
    if (event.key !== " " || own) return;
    event.preventDefault();
    play.click();
  });
  fillSelect("clip", clips.map((entry) => label(entry) + (sources.size > 1 ? ` (${entry.source})` : "")), chooseClip);
  chooseClip(0);
}
