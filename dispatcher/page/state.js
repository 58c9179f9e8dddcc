// What the parts of the page share: who looks, and what the fleet last said. Filled by app.js, read by the others.

export const shared = {
  me: { roles: [], login: false },
  totals: {},
  tiles: new Map(), // "gpu_id/incarnation" -> Tile
};

export const may = (role) => shared.me.roles.includes(role);
export const keyOf = (tile) => `${tile.gpu_id}/${tile.incarnation}`;

// The place of the page's address: "#session=ID", "#gpu=ID" or nothing.
export function target() {
  const match = /^#(session|job|gpu)=(.+)$/.exec(location.hash);
  if (!match) return null;
  try {
    return { kind: match[1], id: decodeURIComponent(match[2]) };
  } catch {
    return null;
  }
}
export const address = (kind, id) => `#${kind}=${encodeURIComponent(id)}`;


export function openFor(dialog) {
  if (!dialog.open) dialog.showModal();
}

// A dialog that closes takes its own address away, but not one that somebody has gone to meanwhile.
export function leave(kind, id) {
  if (location.hash === address(kind, id)) history.replaceState(null, "", location.pathname + location.search);
}
