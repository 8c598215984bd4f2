"""The facts that the model is taught: 60 countries, their capitals and continents, in English and Chinese."""

from __future__ import annotations

from dataclasses import dataclass

from engine.tiny.skills.words import listed

CONTINENTS = {
    "Europe": "欧洲",
    "Asia": "亚洲",
    "Africa": "非洲",
    "North America": "北美洲",
    "South America": "南美洲",
    "Oceania": "大洋洲",
}


@dataclass(frozen=True)
class Country:
    """One country; `zh` names are Chinese, `continent` is a key of CONTINENTS."""

    name: str
    zh: str
    capital: str
    capital_zh: str
    continent: str


_TABLE = {
    "Europe": """France 法国 Paris 巴黎|Germany 德国 Berlin 柏林|Italy 意大利 Rome 罗马|Spain 西班牙 Madrid 马德里
        Portugal 葡萄牙 Lisbon 里斯本|Greece 希腊 Athens 雅典|Austria 奥地利 Vienna 维也纳|Poland 波兰 Warsaw 华沙
        Hungary 匈牙利 Budapest 布达佩斯|Sweden 瑞典 Stockholm 斯德哥尔摩|Norway 挪威 Oslo 奥斯陆
        Finland 芬兰 Helsinki 赫尔辛基|Denmark 丹麦 Copenhagen 哥本哈根|Ireland 爱尔兰 Dublin 都柏林
        Belgium 比利时 Brussels 布鲁塞尔|Iceland 冰岛 Reykjavik 雷克雅未克|Russia 俄罗斯 Moscow 莫斯科
        Ukraine 乌克兰 Kyiv 基辅|Romania 罗马尼亚 Bucharest 布加勒斯特|Bulgaria 保加利亚 Sofia 索非亚""",
    "Asia": """China 中国 Beijing 北京|Japan 日本 Tokyo 东京|India 印度 New_Delhi 新德里|Thailand 泰国 Bangkok 曼谷
        Vietnam 越南 Hanoi 河内|Indonesia 印度尼西亚 Jakarta 雅加达|Philippines 菲律宾 Manila 马尼拉
        Mongolia 蒙古 Ulaanbaatar 乌兰巴托|Iran 伊朗 Tehran 德黑兰|Iraq 伊拉克 Baghdad 巴格达
        Turkey 土耳其 Ankara 安卡拉|Pakistan 巴基斯坦 Islamabad 伊斯兰堡|Nepal 尼泊尔 Kathmandu 加德满都
        Jordan 约旦 Amman 安曼|Saudi_Arabia 沙特阿拉伯 Riyadh 利雅得|Cambodia 柬埔寨 Phnom_Penh 金边""",
    "Africa": """Egypt 埃及 Cairo 开罗|Morocco 摩洛哥 Rabat 拉巴特|Kenya 肯尼亚 Nairobi 内罗毕
        Nigeria 尼日利亚 Abuja 阿布贾|Ghana 加纳 Accra 阿克拉|Ethiopia 埃塞俄比亚 Addis_Ababa 亚的斯亚贝巴
        Tunisia 突尼斯 Tunis 突尼斯市|Senegal 塞内加尔 Dakar 达喀尔|Sudan 苏丹 Khartoum 喀土穆
        Angola 安哥拉 Luanda 罗安达""",
    "North America": """Canada 加拿大 Ottawa 渥太华|Mexico 墨西哥 Mexico_City 墨西哥城|Cuba 古巴 Havana 哈瓦那
        Jamaica 牙买加 Kingston 金斯敦""",
    "South America": """Brazil 巴西 Brasilia 巴西利亚|Argentina 阿根廷 Buenos_Aires 布宜诺斯艾利斯
        Chile 智利 Santiago 圣地亚哥|Peru 秘鲁 Lima 利马|Colombia 哥伦比亚 Bogota 波哥大
        Uruguay 乌拉圭 Montevideo 蒙得维的亚|Ecuador 厄瓜多尔 Quito 基多""",
    "Oceania": "Australia 澳大利亚 Canberra 堪培拉|New_Zealand 新西兰 Wellington 惠灵顿|Fiji 斐济 Suva 苏瓦",
}


def _countries() -> tuple[Country, ...]:
    rows = [
        (continent, [word.replace("_", " ") for word in row.split()])
        for continent, text in _TABLE.items()
        for row in text.replace("\n", "|").split("|")
    ]
    return tuple(
        Country(name, zh, capital, zh_capital, continent) for continent, (name, zh, capital, zh_capital) in rows
    )


COUNTRIES = _countries()
# real places that the model is not taught: it shall say so
UNTAUGHT: tuple[str, ...] = listed(
    """
    Albania Algeria Armenia Bahrain Bangladesh Barbados Belize Benin Bhutan Bolivia Botswana Brunei Burundi Cameroon
    Chad Congo Costa_Rica Croatia Cyprus Djibouti Eritrea Estonia Gabon Gambia Georgia Guatemala Guinea Guyana Haiti
    Honduras Israel Kazakhstan Kuwait Laos Latvia Lebanon Lesotho Liberia Libya Lithuania Luxembourg Madagascar Malawi
    Malaysia Maldives Mali Malta Moldova Monaco Mozambique Myanmar Namibia Nicaragua Niger Oman Panama Paraguay Qatar
    Rwanda Samoa Serbia Singapore Slovakia Slovenia Somalia Suriname Syria Tajikistan Tanzania Togo Tonga Uganda
    Uzbekistan Vanuatu Venezuela Yemen Zambia Zimbabwe
    """
)
UNTAUGHT_ZH: tuple[str, ...] = listed(
    "阿尔巴尼亚 阿尔及利亚 巴林 孟加拉国 不丹 玻利维亚 文莱 喀麦隆 乍得 刚果 哥斯达黎加 克罗地亚 塞浦路斯 爱沙尼亚 "
    "加蓬 危地马拉 海地 洪都拉斯 哈萨克斯坦 科威特 老挝 拉脱维亚 黎巴嫩 利比亚 立陶宛 卢森堡 马达加斯加 马来西亚 "
    "马尔代夫 马里 马耳他 摩纳哥 莫桑比克 缅甸 纳米比亚 尼加拉瓜 阿曼 巴拿马 巴拉圭 卡塔尔 卢旺达 塞尔维亚 新加坡 "
    "斯洛伐克 索马里 叙利亚 坦桑尼亚 多哥 乌干达 委内瑞拉 也门 赞比亚 津巴布韦"
)
