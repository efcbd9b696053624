// Starts what the page's data has something for.

const data = JSON.parse(byId("data").textContent);
if (data.clips.length) startPlayer(data.clips);
if (data.masks.length) startMask(data.masks);
if (data.heads.length) startHeads(data.heads);
