// All texts of the page, in English and Chinese.

export const LANGUAGES = { en: "English", zh: "中文" };

export const TEXTS = {
  en: {
    title: "Chat", skip: "Skip to the message box", chats: "Chats", new: "New chat", results: "Results",
    settings: "Settings", shortcuts: "Keyboard", menu: "Show or hide the chats", model: "Model",
    secondModel: "Second model", versus: "and", compare: "Compare", blind: "Blind", export: "Export",
    conversation: "Conversation", latest: "Go to the latest answer",
    compareHint: "Two answers side by side", blindHint: "Hide the names and shuffle the sides until you vote",
    emptyTitle: "What did it learn?",
    emptyText: "Talk to your model, or compare two on the same prompt. Your votes become training data.",
    starters: ["Explain gravity to a child.", "Write a short poem about the sea.", "Give me three tips for learning a language."],
    prompt: "Message", promptHint: "Write a message…", send: "Send", stop: "Stop",
    hint: "Enter sends, Shift+Enter starts a new line. Everything stays on this server and in this browser.",
    you: "You", edit: "Edit", editPrompt: "Edit your message", editAnswer: "Make this answer better", save: "Save",
    saveSend: "Save and send", cancel: "Cancel", copy: "Copy", copied: "Copied", again: "Answer again",
    good: "Good answer", bad: "Bad answer", earlier: "Earlier answer", later: "Later answer", of: "{i} of {n}",
    side: ["A", "B"], answerBy: "Answer by {name}", answerSide: "Answer {side}", hidden: "name hidden",
    writing: "Writing…", finished: "The answer is complete.", stoppedNote: "Stopped.",
    lengthNote: "Cut at the limit of tokens.", interrupted: "This answer was interrupted.",
    emptyAnswer: "The answer is empty.", dropped: "The context was full: the {n} oldest messages were left out.",
    edited: "Edited", editedNote: "Your version. The chat goes on with it.", original: "Original",
    reward: "reward {x}", rewardHint: "Score of the reward model: higher is better",
    voteTitle: "Which answer is better?", left: "A is better", right: "B is better", tie: "Tie", bothBad: "Both bad",
    votedLeft: "You chose A.", votedRight: "You chose B.", votedTie: "You called it a tie.",
    votedBothBad: "You found both bad.", undo: "Undo", undone: "Vote taken back.", comment: "Comment",
    commentHint: "Why? (optional)", commentSaved: "Comment saved.", voteSaved: "Saved for training.",
    voteKept: "Saved.", goesOn: " The chat goes on with {side}.", undoCut: "Later messages were removed.",
    chatDeleted: "Chat deleted.", deleteChat: "Delete this chat: {title}", untitled: "New chat",
    unreachable: "The server does not answer. Trying again…", back: "The server is back.",
    failed: "The answer did not come: {reason}", lost: "the connection was lost", retry: "Try again", close: "Close",
    language: "Language", theme: "Appearance", auto: "As the system", light: "Light", dark: "Dark",
    system: "System prompt", systemHint: "What the model is told before the first message",
    sampling: "Sampling", temperature: "Temperature", temperatureHint: "0 always takes the likeliest token; higher varies more",
    top_p: "Top p", top_pHint: "Only the likeliest tokens that add up to this share; 1 is off",
    top_k: "Top k", top_kHint: "Only this many likeliest tokens; 0 is off",
    min_p: "Min p", min_pHint: "Only tokens with at least this share of the likeliest one's probability; 0 is off",
    repetition_penalty: "Repetition penalty", repetition_penaltyHint: "Above 1 repeats less; 1 is off",
    max_tokens: "Most tokens", max_tokensHint: "Longest answer; empty: what the context leaves",
    seed: "Seed", seedHint: "The same seed gives the same answer; empty: a new one each time",
    showReward: "Show the reward model's score", deleteAll: "Delete all chats", deleteAllSure: "Press again to delete all chats",
    allDeleted: "All chats were deleted.", exportMarkdown: "This chat as Markdown", exportJson: "This chat as JSON", exportAll: "All chats as JSON",
    keyTitle: "API key", keyText: "This server asks for a key. It is kept until you close this tab.", continue: "Continue",
    keys: [["Enter", "Send"], ["Shift + Enter", "New line"], ["Esc", "Stop the answer"], ["Alt + N", "New chat"],
      ["Alt + 1", "A is better"], ["Alt + 2", "B is better"], ["Alt + 3", "Tie"], ["Alt + 4", "Both bad"],
      ["Alt + Z", "Take the last vote back"], ["Alt + R", "Answer again"], ["/", "Go to the message box"], ["?", "This list"]],
    noVotes: "No votes yet. Choose “Compare”, send a message and vote.",
    votes: "Votes: {n}. Both bad: {bad}.", winRates: "Win rates",
    winRateHint: "How often you prefer the first model; a tie counts half. The line is the 95 % interval.",
    pair: "{a} against {b}", counts: "{wins} won · {ties} tied · {losses} lost",
    agreement: "The reward model agrees with you", agreementHint: "Share of decided votes in which it scores your choice higher",
    position: "The left answer wins", positionHint: "50 % is no bias; blind votes shuffle the sides",
    thumbs: "Thumbs up", files: "Files are in {folder}. Train on them:", votesOf: "votes: {n}",
  },
  zh: {
    title: "聊天", skip: "跳到输入框", chats: "聊天记录", new: "新聊天", results: "结果", settings: "设置",
    shortcuts: "键盘", menu: "显示或隐藏聊天记录", model: "模型", secondModel: "第二个模型", versus: "与",
    compare: "对比", blind: "盲测", export: "导出", conversation: "对话", latest: "跳到最新回答",
    compareHint: "并排显示两个回答", blindHint: "投票前隐藏模型名称并打乱左右",
    emptyTitle: "它学到了什么？",
    emptyText: "和你的模型聊聊，或让两个模型回答同一个问题。你的投票会成为训练数据。",
    starters: ["用孩子能懂的话解释重力。", "写一首关于大海的短诗。", "给我三条学习外语的建议。"],
    prompt: "消息", promptHint: "输入消息…", send: "发送", stop: "停止",
    hint: "按 Enter 发送，按 Shift+Enter 换行。所有内容只保存在此服务器和此浏览器中。",
    you: "你", edit: "编辑", editPrompt: "编辑你的消息", editAnswer: "改进这个回答", save: "保存",
    saveSend: "保存并发送", cancel: "取消", copy: "复制", copied: "已复制", again: "重新回答",
    good: "好回答", bad: "差回答", earlier: "上一个回答", later: "下一个回答", of: "{i} / {n}",
    side: ["A", "B"], answerBy: "{name} 的回答", answerSide: "回答 {side}", hidden: "名称已隐藏",
    writing: "正在回答…", finished: "回答已完成。", stoppedNote: "已停止。",
    lengthNote: "已达到长度上限。", interrupted: "此回答被中断。",
    emptyAnswer: "回答为空。", dropped: "上下文已满：省略了最早的 {n} 条消息。",
    edited: "已编辑", editedNote: "这是你的版本，对话将以它继续。", original: "原文",
    reward: "奖励 {x}", rewardHint: "奖励模型的评分：越高越好",
    voteTitle: "哪个回答更好？", left: "A 更好", right: "B 更好", tie: "一样好", bothBad: "都不好",
    votedLeft: "你选择了 A。", votedRight: "你选择了 B。", votedTie: "你认为一样好。",
    votedBothBad: "你认为都不好。", undo: "撤销", undone: "已撤销投票。", comment: "评论",
    commentHint: "为什么？（可不填）", commentSaved: "评论已保存。", voteSaved: "已保存，可用于训练。",
    voteKept: "已保存。", goesOn: "对话将以 {side} 继续。", undoCut: "后面的消息已删除。",
    chatDeleted: "聊天已删除。", deleteChat: "删除此聊天：{title}", untitled: "新聊天",
    unreachable: "服务器没有响应，正在重试…", back: "服务器已恢复。",
    failed: "没有得到回答：{reason}", lost: "连接已断开", retry: "重试", close: "关闭",
    language: "语言", theme: "外观", auto: "跟随系统", light: "浅色", dark: "深色",
    system: "系统提示词", systemHint: "在第一条消息之前告诉模型的内容",
    sampling: "采样", temperature: "温度", temperatureHint: "0 总是取最可能的词元；越高变化越多",
    top_p: "Top p", top_pHint: "只取概率之和达到此值的最可能词元；1 为关闭",
    top_k: "Top k", top_kHint: "只取最可能的若干个词元；0 为关闭",
    min_p: "Min p", min_pHint: "只取概率不低于最高概率此比例的词元；0 为关闭",
    repetition_penalty: "重复惩罚", repetition_penaltyHint: "大于 1 减少重复；1 为关闭",
    max_tokens: "最多词元", max_tokensHint: "回答的最大长度；留空则用完上下文",
    seed: "随机种子", seedHint: "相同的种子得到相同的回答；留空则每次不同",
    showReward: "显示奖励模型的评分", deleteAll: "删除所有聊天", deleteAllSure: "再按一次删除所有聊天",
    allDeleted: "已删除所有聊天。", exportMarkdown: "此聊天导出为 Markdown", exportJson: "此聊天导出为 JSON", exportAll: "所有聊天导出为 JSON",
    keyTitle: "API 密钥", keyText: "此服务器需要密钥。密钥会保留到关闭此标签页为止。", continue: "继续",
    keys: [["Enter", "发送"], ["Shift + Enter", "换行"], ["Esc", "停止回答"], ["Alt + N", "新聊天"],
      ["Alt + 1", "A 更好"], ["Alt + 2", "B 更好"], ["Alt + 3", "一样好"], ["Alt + 4", "都不好"],
      ["Alt + Z", "撤销上一次投票"], ["Alt + R", "重新回答"], ["/", "跳到输入框"], ["?", "显示此列表"]],
    noVotes: "还没有投票。选择“对比”，发送消息并投票。",
    votes: "共 {n} 票，“都不好” {bad} 票。", winRates: "胜率",
    winRateHint: "你更喜欢第一个模型的比例；平局算一半。横线为 95% 区间。",
    pair: "{a} 对 {b}", counts: "{wins} 胜 · {ties} 平 · {losses} 负",
    agreement: "奖励模型与你一致", agreementHint: "在有胜负的投票中，它给你的选择更高分的比例",
    position: "左侧回答获胜", positionHint: "50% 表示没有偏向；盲测会打乱左右",
    thumbs: "好评", files: "文件在 {folder} 中。用它们训练：", votesOf: "{n} 票",
  },
};

let language = "en";

/** The text of a key, with its blanks filled. */
export function t(key, blanks = {}) {
  const text = TEXTS[language][key];
  return typeof text === "string" ? text.replace(/\{(\w+)\}/g, (_, name) => blanks[name]) : text;
}

/** Sets the language and fills the texts of the page itself. */
export function setLanguage(name) {
  language = name in TEXTS ? name : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = `${t("title")} · lightning_rlhf`;
  for (const element of document.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of document.querySelectorAll("[data-placeholder]")) element.placeholder = t(element.dataset.placeholder);
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", t(element.dataset.label));
    if (element.tagName === "BUTTON") element.title = t(element.dataset.label);
  }
}
