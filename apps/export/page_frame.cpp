#include "apps/export/page_frame.h"

#include <fmt/format.h>

#include "apps/output/html.h"

namespace perigee::apps {
namespace {

constexpr std::string_view kStyle = R"css(
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--paper:#fff;--panel:#f6f8fa;--edge:#d0d7de;--accent:#0550ae;
--l1:#fef0c8;--l2:#fdd88c;--l3:#fdae61;--l4:#f47843;--l5:#d73c27;--l6:#960026;--on:#111;--deep:#fff;
--v0:#8dd3c7;--v1:#ffffb3;--v2:#bebada;--v3:#fb8072;--v4:#80b1d3;--v5:#fdb462;--v6:#b3de69;--v7:#fccde5;--up:#8fd19e;--down:#f0a3a3}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--paper:#0d1117;--panel:#161b22;--edge:#30363d;--accent:#79c0ff}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:80rem;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .4rem;border-top:1px solid var(--edge);padding-top:1rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
.soft{color:var(--soft)}
pre{margin:0;padding:.7rem;background:var(--panel);border:1px solid var(--edge);border-radius:6px;font:13px/1.55 ui-monospace,monospace;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;direction:ltr;text-align:left;max-height:40rem;overflow:auto}
pre:focus{outline:2px solid var(--accent)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.4rem 0}dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
h4{font-size:.9rem;margin:.5rem 0 .2rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.2rem .6rem;border-bottom:1px solid var(--edge);
vertical-align:top}td:last-child{overflow-wrap:anywhere;min-width:8rem}th{color:var(--soft);font-weight:600}td.n,th.n{text-align:right;white-space:nowrap}tr.this{background:var(--panel);font-weight:600}
details{margin:.5rem 0;border:1px solid var(--edge);border-radius:6px;padding:.4rem .7rem}summary{cursor:pointer;overflow-wrap:anywhere}
.bar{display:none;gap:.6rem;align-items:center;flex-wrap:wrap;margin:.4rem 0}.scripted .bar{display:flex}
.tip{min-height:1.5em;color:var(--soft);font:13px ui-monospace,monospace}
i{font-style:normal;border-radius:2px}i.at{outline:2px solid var(--accent)}
.l1,.l2,.l3,.l4,.v0,.v1,.v2,.v3,.v4,.v5,.v6,.v7,.up,.down{color:var(--on)}.l5,.l6{color:var(--deep)}
.l1{background:var(--l1)}.l2{background:var(--l2)}.l3{background:var(--l3)}.l4{background:var(--l4)}.l5{background:var(--l5)}.l6{background:var(--l6)}
.v0{background:var(--v0)}.v1{background:var(--v1)}.v2{background:var(--v2)}.v3{background:var(--v3)}.v4{background:var(--v4)}.v5{background:var(--v5)}.v6{background:var(--v6)}.v7{background:var(--v7)}
.up{background:var(--up)}.down{background:var(--down)}
.key i{padding:0 .3rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1rem}
figure{margin:0;padding:.6rem;background:var(--panel);border:1px solid var(--edge);border-radius:6px}figcaption{display:flex;justify-content:space-between;gap:1rem}
svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.tick{stroke:var(--edge);stroke-width:1}.line{fill:none;stroke:var(--accent);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
@media print{pre{max-height:none}.bar{display:none}}
)css";

// What is shown without it: everything but the numbers of single tokens and points. Text is set by textContent alone.
constexpr std::string_view kScript = R"js(
'use strict';
document.documentElement.classList.add('scripted');
const shade=x=>x===null||x<-8?'l6':x<-4?'l5':x<-2?'l4':x<-1?'l3':x<-.5?'l2':x<-.1?'l1':'';
for(const episode of document.querySelectorAll('section.episode')){
  const data=JSON.parse(episode.querySelector('script').textContent);
  const cells=[];
  for(const box of episode.querySelectorAll('pre.tokens')){
    let at=Number(box.dataset.from);
    for(const el of box.querySelectorAll('i')){
      const n=Number(el.dataset.n||1);
      cells.push({el,at,n,box});
      at+=n;
    }
  }
  const index=new Map(cells.map((c,i)=>[c.el,i]));
  const versions=[...new Set(data.versions)].sort((a,b)=>a-b);
  const tip=episode.querySelector('.tip'),mode=episode.querySelector('select'),key=episode.querySelector('.key');
  const paint=()=>{
    const how=mode.value;
    for(const c of cells)
      c.el.className=how==='logprob'?shade(data.logprobs[c.at]):how==='version'?'v'+versions.indexOf(data.versions[c.at])%8:
        how==='advantage'&&data.advantage?(data.advantage>0?'up':'down'):'';
    key.replaceChildren();
    const add=(cls,text)=>{const i=document.createElement('i');i.className=cls;i.textContent=text;key.append(i,' ');};
    if(how==='logprob')[['','0 to -0.1'],['l1','to -0.5'],['l2','to -1'],['l3','to -2'],['l4','to -4'],['l5','to -8'],['l6','below']].forEach(x=>add(...x));
    if(how==='version')versions.slice(0,64).forEach((v,i)=>add('v'+i%8,String(v)));
    if(how==='advantage')key.textContent=data.advantage===null?'no advantage: not trained on':'advantage '+data.advantage+', the same for every token';
  };
  let current=-1;
  const tell=i=>{
    if(current>=0)cells[current].el.classList.remove('at');
    current=i;
    if(i<0)return;
    const c=cells[i],parts=[];
    c.el.classList.add('at');
    for(let k=c.at;k<c.at+c.n;++k){
      const p=data.logprobs[k];
      parts.push('token '+k+', id '+data.ids[k]+', log-probability '+(p===null?'not finite':p.toFixed(4)+' ('+(100*Math.exp(p)).toFixed(2)+' %)')+', version '+data.versions[k]);
    }
    tip.textContent=parts.join('; ');
  };
  episode.addEventListener('pointerover',e=>{if(index.has(e.target))tell(index.get(e.target));});
  episode.addEventListener('keydown',e=>{
    if(!e.target.classList.contains('tokens')||(e.key!=='ArrowLeft'&&e.key!=='ArrowRight'))return;
    e.preventDefault();
    const first=cells.findIndex(c=>c.box===e.target);
    const last=cells.findLastIndex(c=>c.box===e.target);
    if(first<0)return;
    const inside=current>=first&&current<=last;
    const to=!inside?first:Math.min(last,Math.max(first,current+(e.key==='ArrowRight'?1:-1)));
    tell(to);
    cells[to].el.scrollIntoView({block:'nearest'});
  });
  mode.addEventListener('change',paint);
  paint();
}
const charts=document.getElementById('charts');
if(charts){
  const all=JSON.parse(charts.textContent);
  document.querySelectorAll('figure').forEach((figure,n)=>{
    const c=all[n],svg=figure.querySelector('svg'),out=figure.querySelector('.now'),spot=document.createElementNS('http://www.w3.org/2000/svg','line');
    const now=out.textContent;
    spot.setAttribute('class','line');
    spot.setAttribute('visibility','hidden');
    svg.append(spot);
    const left=Number(svg.dataset.x0),right=Number(svg.dataset.x1),first=c.steps[0],last=c.steps[c.steps.length-1];
    svg.addEventListener('pointermove',e=>{
      const box=svg.getBoundingClientRect(),x=(e.clientX-box.left)/box.width*640;
      const want=first+(last-first)*Math.min(1,Math.max(0,(x-left)/(right-left)));
      let best=0;
      c.steps.forEach((s,i)=>{if(Math.abs(s-want)<Math.abs(c.steps[best]-want))best=i;});
      const px=last>first?left+(right-left)*(c.steps[best]-first)/(last-first):(left+right)/2;
      for(const [k,v] of [['x1',px],['x2',px],['y1',8],['y2',178],['visibility','visible']])spot.setAttribute(k,v);
      out.textContent='step '+c.steps[best]+': '+c.texts[best];
    });
    svg.addEventListener('pointerleave',()=>{out.textContent=now;spot.setAttribute('visibility','hidden');});
  });
}
)js";

}  // namespace

std::string page_head(std::string_view title) {
  return fmt::format(
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src {}; script-src {}; base-uri "
      "'none'; form-action 'none'\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"referrer\" "
      "content=\"no-referrer\">\n"
      "<title>{}</title>\n<style>{}</style>\n</head>\n<body>\n",
      csp_hash(kStyle), csp_hash(kScript), escape_html(title), kStyle);
}

std::string page_foot() { return fmt::format("<script>{}</script>\n</body>\n</html>\n", kScript); }

}  // namespace perigee::apps
