// Plays the videos of one prompt in step: the first leads, the others follow to within a frame.
const get = (id) => document.getElementById(id);
const { clips, amplify, plays } = JSON.parse(get("data").textContent);
const [stage, play, slider, time, rate] = ["stage", "play", "frame", "time", "rate"].map(get);
let clip, videos = [], playing = false;

function make(tag, values, ...inner) {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...inner);
  return element;
}

function show(number) {
  videos.forEach((video) => URL.revokeObjectURL(video.src));
  clip = clips[number];
  const { width, height } = clip, className = width < 200 ? "small" : "";
  videos = clip.videos.map(({ source }) => {
    const bytes = Uint8Array.from(atob(source.split(",")[1]), (letter) => letter.charCodeAt(0));
    const src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
    return make("video", { src, width, height, className, muted: true, playsInline: true, onseeked: compare });
  });
  stage.replaceChildren(...clip.videos.map(({ name, caption }, i) => {
    const style = `filter: brightness(${amplify})`;
    const compared = i && clip.compared ? [make("canvas", { width, height, className, style })] : [];
    return make("figure", {}, videos[i], make("figcaption", {}, make("strong", {}, name), ` ${caption}`), ...compared);
  }));
  slider.max = clip.frames - 1;
  step(-clip.frames);
}

function compare() { // draws |video - first| below each other video
  stage.querySelectorAll("canvas").forEach((canvas) => {
    const context = canvas.getContext("2d");
    [["copy", videos[0]], ["difference", canvas.parentElement.firstChild]].forEach(([mode, source]) => {
      context.globalCompositeOperation = mode;
      context.drawImage(source, 0, 0, clip.width, clip.height);
    });
  });
}

function say(frame) {
  slider.value = frame;
  time.textContent = `${Number(slider.value) + 1} / ${clip.frames}`;
}

function step(by) {
  toggle(false);
  say(Number(slider.value) + by);
  videos.forEach((video) => (video.currentTime = (Number(slider.value) + 0.5) / clip.fps));
}

function toggle(wanted) {
  playing = wanted;
  play.textContent = playing ? "Pause" : "Play";
  videos.forEach((video) => (playing ? video.play().catch(() => {}) : video.pause()));
  if (playing) requestAnimationFrame(follow);
}

function follow() {
  if (!playing) return;
  const first = videos[0];
  if (first.ended) videos.forEach((video) => video.play().catch(() => {})); // from the beginning
  videos.forEach((video) => {
    const ahead = (video.currentTime - first.currentTime) * clip.fps; // in frames
    if (Math.abs(ahead) > 0.9 && !video.seeking) video.currentTime = first.currentTime;
    video.playbackRate = rate.value * (1 - Math.max(-0.2, Math.min(ahead / 4, 0.2)));
  });
  say(Math.floor(first.currentTime * clip.fps + 1e-3));
  compare();
  requestAnimationFrame(follow);
}

const keys = { " ": () => toggle(!playing), ArrowLeft: () => step(-1), ArrowRight: () => step(1) };
play.onclick = keys[" "];
get("back").onclick = keys.ArrowLeft;
get("forward").onclick = keys.ArrowRight;
slider.oninput = () => step(0);
get("clip").onchange = (event) => show(event.target.value);
document.onkeydown = (event) => {
  const taken = event.key === " " ? "button, select, summary, [type=checkbox]" : "select, .scroll";
  if (!keys[event.key] || event.altKey || event.ctrlKey || event.metaKey || event.target.closest(taken)) return;
  event.preventDefault();
  keys[event.key]();
};
show(0);
if (plays) toggle(true);
