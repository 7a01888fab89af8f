"""How the leaderboard looks, beyond the common style of platform/pages/theme.py."""

from __future__ import annotations

BOARD_STYLE = """
body.board { display: block; max-width: 112rem; padding-top: 2rem; }
.board header { padding-bottom: .6rem; }
.board h1 { font-size: 1.6rem; color: var(--ink); margin: 0 0 .3rem; letter-spacing: -.012em; }
.board section { padding-top: 1.6rem; }
.board section:first-of-type { border-top: 0; padding-top: .4rem; }
[hidden] { display: none !important; }
#note { color: var(--muted); margin: 0; max-width: none; min-height: 1.55em; }
#error { border-left: 4px solid var(--c1, #c2500a); padding: .3rem .8rem; max-width: none; }
.filters { display: flex; flex-wrap: wrap; gap: .7rem 1.1rem; align-items: end;
  margin: 0 0 1.1rem; }
.filters label { display: flex; flex-direction: column; font-size: .82rem; color: var(--muted);
  gap: .15rem; max-width: 100%; }
.filters .check { flex-direction: row; align-items: center; gap: .45rem; padding-bottom: .4rem;
  font-size: .9rem; }
.filters input[type=search], .filters select { font: inherit; font-size: .95rem;
  color: var(--ink); background: var(--paper); border: 1px solid var(--muted);
  border-radius: 4px; padding: .3rem .5rem; max-width: 100%; min-height: 2.2rem; }
.filters select { max-width: 17rem; }
.filters input[type=search] { width: 17rem; }
.filters input[type=checkbox] { width: 1.1rem; height: 1.1rem; accent-color: var(--accent); }
.board .scroll { width: 100%; margin-bottom: .8rem; }
.board table { width: 100%; }
.board thead th { white-space: nowrap; }
.board thead button { text-decoration: none; font-weight: 600; color: inherit; }
.board thead button:hover { color: var(--accent); text-decoration: underline; }
.board thead button::after { content: " "; display: inline-block; width: .9em; }
.board th[aria-sort=descending] button::after { content: "▾"; color: var(--accent); }
.board th[aria-sort=ascending] button::after { content: "▴"; color: var(--accent); }
.board th, .board td { padding-right: 1.1rem; }
.board tbody th { overflow-wrap: anywhere; min-width: 9rem; max-width: 22rem; }
.board td.word { overflow-wrap: break-word; max-width: 18rem; }
.board td[data-key=recipe] { min-width: 10.5rem; overflow-wrap: anywhere; }
.board td[data-key=data] { min-width: 8.5rem; overflow-wrap: anywhere; }
.board td.tight { white-space: nowrap; overflow-wrap: normal; }
.board tr.champion > * { background: var(--shade); }
.board tr.champion th::before { content: "★ "; color: var(--accent); }
.board .ap { font-weight: 650; }
.board .by { color: var(--muted); font-size: .85em; }
#more { margin: 0 0 1.6rem; padding: .35rem 0; }
#pareto { min-height: 26rem; }
@media (max-width: 100rem) { .board .least { display: none; } }
@media (max-width: 46rem) {
  .board .minor { display: none; }
  .filters label { flex: 1 1 40%; }
  .filters label:first-child { flex-basis: 100%; }
  .filters input[type=search], .filters select { width: 100%; max-width: none; }
}
"""
